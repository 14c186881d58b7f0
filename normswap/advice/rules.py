"""Which norm for which situation: the rules as data, each with its reason and its sources. Another one is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..arguments import one_of, whole
from ..choices import PURPOSES
from ..errors import Fix, OptionError, Text

LARGE = 16
"""Images a GPU from which BatchNorm is as good as it gets: Wu and He 2018, table 2, ResNet-50 on ImageNet: 23.7 % error
at 16, 23.6 at 32; 24.8 at 8. GroupNorm has 24.0 to 24.2 throughout."""
_ARXIV = "https://arxiv.org/abs/"
USUAL_BATCH = 2
"""What `finetune` takes, where nobody says."""


@dataclass(frozen=True)
class Source:
    """What a rule rests on. link: of the web, or of a page of this documentation."""

    name: str
    link: str

    def __str__(self) -> str:
        paper = self.link.removeprefix(_ARXIV)
        return f"{self.name}, {f'arXiv:{paper}' if paper != self.link else f'docs/{self.link}'}"

    @property
    def markdown(self) -> str:
        """As the documentation writes it."""
        return f"[{self.name}]({self.link})"


WU_HE = Source("Wu and He 2018", _ARXIV + "1803.08494")
ULYANOV = Source("Ulyanov et al. 2016", _ARXIV + "1607.08022")
BA = Source("Ba et al. 2016", _ARXIV + "1607.06450")
DE = Source("De et al. 2022", _ARXIV + "2204.13650")
HSIEH = Source("Hsieh et al. 2020", _ARXIV + "1910.00189")
ZHONG = Source("Zhong et al. 2023 (FixBN)", _ARXIV + "2303.06530")
CHI = Source("Chi et al. 2023", _ARXIV + "2303.04137")
SMALL_BATCHES = Source("our measurements at small batches", "finetuning.md#what-to-expect")
PADDED_STEPS = Source("how padding goes into statistics", "how-it-works.md#sequences-padded-steps-do-not-count")
NO_CONVERSION = Source("what no conversion can do", "how-it-works.md#what-no-conversion-can-do")


@dataclass(frozen=True)
class Situation:
    """What the network is for. Checks itself.

    batch_size: images a GPU in training; None for that of `finetune`. private: per-sample gradients, as differential
    privacy and vmap need them. ema: its weights are averaged. resembles: whether the data is like what the network was
    trained on, None where nobody knows. steps: whether its norms read sequences, `(N, C, T)`, and not vectors alone.
    """

    task: str = "classification"
    batch_size: int | None = None
    private: bool = False
    federated: bool = False
    ema: bool = False
    inference: bool = False
    resembles: bool | None = None
    steps: bool = False

    def __post_init__(self) -> None:
        one_of("task", self.task, PURPOSES)
        if self.batch_size is not None:
            whole("batch_size", self.batch_size)
        training = [name for name in ("private", "federated", "ema") if getattr(self, name)]
        training += ["batch_size"] if self.batch_size is not None else []
        if self.inference and training:
            named = Text.joined(" and ", [Text(Fix(name)) for name in training])
            verb = " is" if len(training) == 1 else " are"
            raise OptionError(Text(Fix("inference"), " is for a network that is not trained; ", named, verb, " of one"))

    @property
    def batch(self) -> int:
        """Images a GPU in training."""
        return USUAL_BATCH if self.batch_size is None else self.batch_size


@dataclass(frozen=True)
class Rule:
    """What to take when `holds`. The first rule that holds decides.

    when: that in words, for the table in the documentation. reason: one line. but: what speaks against it.
    """

    when: str
    holds: Callable[[Situation], bool]
    norm: str
    reason: str
    sources: tuple[Source, ...]
    but: str = ""


RULES = (
    Rule(
        "inference only",
        lambda s: s.inference,
        "fused",
        "nothing trains, so BatchNorm can vanish into the layers before it, and costs nothing at run time",
        (NO_CONVERSION,),
    ),
    Rule(
        "style transfer",
        lambda s: s.task == "style",
        "in",
        "contrast is each image's own, and InstanceNorm takes it out",
        (ULYANOV,),
    ),
    Rule(
        "sequences whose norms read (N, C, T)",
        lambda s: s.task == "sequence" and s.steps,
        "ln-channel",
        "statistics are of each step alone, so neither the batch nor padding goes in; ln would take them over time",
        (BA, PADDED_STEPS),
    ),
    Rule(
        "sequences whose norms read vectors (N, C); transformers (N, T, C)",
        lambda s: s.task == "sequence",
        "ln",
        "statistics are of each vector or step alone, so neither the batch nor padding goes in",
        (BA,),
    ),
    Rule(
        "per-sample gradients: differential privacy, vmap",
        lambda s: s.private,
        "gn",
        "one sample's gradient must not depend on the others, and BatchNorm mixes them",
        (DE,),
    ),
    Rule(
        "federated learning",
        lambda s: s.federated,
        "gn",
        "clients with different data have different batch statistics, which do not average",
        (HSIEH, ZHONG),
        "FixBN reports that BatchNorm does better in many settings if its statistics are frozen after some rounds",
    ),
    Rule(
        "averaged weights (EMA)",
        lambda s: s.ema,
        "gn",
        "averaged weights do not fit the running statistics of the weights they are averaged from",
        (CHI,),
    ),
    Rule(
        f"classification, {LARGE} images a GPU or more",
        lambda s: s.task == "classification" and s.batch >= LARGE,
        "bn",
        "batches are large enough for BatchNorm's statistics, and nothing need be swapped",
        (WU_HE,),
    ),
    Rule(
        "small batches, detection, segmentation; the data is like what the network was trained on",
        lambda s: s.resembles is True,
        "frozen",
        "the running statistics suit the data, and frozen they suffer from no batch",
        (SMALL_BATCHES,),
    ),
    Rule(
        "small batches, detection, segmentation; other data, or not known",
        lambda s: True,
        "gn",
        "GroupNorm's accuracy does not depend on the batch size, nor on statistics of other data",
        (WU_HE, SMALL_BATCHES),
    ),
)


def rule_for(situation: Situation) -> Rule:
    """The first rule that holds."""
    return next(rule for rule in RULES if rule.holds(situation))


def decision_table() -> str:
    """All rules as a table in Markdown."""
    rows = [
        f"| {rule.when} | `{rule.norm}` | {rule.reason}{f'. But: {rule.but}' if rule.but else ''} | "
        f"{', '.join(source.markdown for source in rule.sources)} |"
        for rule in RULES
    ]
    return "\n".join(["| the network is for | norm | why | source |", "|---|---|---|---|", *rows])
