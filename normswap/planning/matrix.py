"""From which norm type to which: what the planner says of a small network with the one, asked for the other.

Nothing is known here of any type. A conversion is `exact` where the network computes the same afterwards, `close` where
it starts near, `needs images` where `calibrate` has to estimate statistics first, and `refused` where no plan is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..choices import MISSING_STATISTICS
from ..errors import DataError, PlanError
from ..inspection.inventory import inspect
from ..norms.registry import build, identify, specs
from ..norms.spec import NormRequest, NormSpec, NormState
from .options import PlanOptions
from .plan import Step, Transfer
from .planner import planned

CHANNELS, GROUPS = 32, 4
INPUTS = {"images": (2, 3, 4, 4), "tokens": (2, 4, 3), "vectors": (2, 3)}


class Outcome(str, Enum):
    """What becomes of the network's outputs. Each is a text too."""

    EXACT = "exact"
    CLOSE = "close"
    IMAGES = "needs images"
    REFUSED = "refused"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Conversion:
    """One cell. layout: what the network is given, `images` or `tokens`. options: beside `to`, what it takes to be so.
    note: where it is otherwise; why: of a refusal, the planner's reason."""

    source: str
    target: str
    outcome: Outcome
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"outcome": str(self.outcome)}


def conversions(sources: tuple[NormSpec, ...], targets: tuple[NormSpec, ...]) -> list[Conversion]:
    """Every cell of these rows and columns, row by row; a type that leaves nothing to read has no row."""
    columns = [spec for spec in targets if spec.build is not None]
    rows = [spec for spec in sources if spec.build is not None and not spec.fuses]
    return [cell for source in rows for cell in _row(source, columns)]


def conversions_of(norm: nn.Module) -> list[Conversion]:
    """The row of one module's own type, as the planner answers for that very module."""
    if (spec := identify(norm)) is None:
        return []
    return list(_row(spec, [target for target in specs() if target.build is not None], norm))


def all_conversions() -> list[Conversion]:
    """The whole matrix."""
    return conversions(specs(), specs())


def notes(cells: Iterable[Conversion]) -> list[str]:
    """What cells say beside their outcome, in sentences: those of one note together, sources of like targets too."""
    targets: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.note:
            targets.setdefault((cell.note, cell.source), []).append(cell.target)
    told: dict[str, dict[str, list[str]]] = {}
    for (note, source), names in targets.items():
        told.setdefault(note, {}).setdefault(", ".join(names), []).append(source)
    return [
        "; ".join(f"{', '.join(sources)} to {names}" for names, sources in groups.items()) + f": {note}."
        for note, groups in told.items()
    ]


def norm_of(spec: NormSpec, groups: int = GROUPS, dims: int = 2) -> nn.Module:
    """A norm of that type for `CHANNELS` channels, in eval mode, with a gamma, a beta and statistics at random."""
    drawn = torch.rand(4, CHANNELS, generator=torch.Generator().manual_seed(0)) + 0.5
    weight, bias, mean, var = drawn
    state = NormState(
        CHANNELS, 1e-5, nn.Parameter(weight), nn.Parameter(bias), mean, var, torch.tensor(1), dims=dims, training=False
    )
    options = spec.fit(state, NormRequest(groups=groups if spec.takes_groups else None))
    for channel_dim in (1, -1):  # a type may build another one's class for channels in another place
        module = build(spec, replace(state, channel_dim=channel_dim), options)
        if identify(module) is spec:
            return module
    raise ValueError(f"{spec.name} builds no module that is one")


def network_of(norm: nn.Module, layout: str) -> nn.Module:
    """A layer, the norm, and a layer that reads it."""
    spec = identify(norm)
    channels = CHANNELS if spec is None else spec.read(norm).channels
    if layout == "images":
        return nn.Sequential(nn.Conv2d(3, channels, 1), norm, nn.ReLU(), nn.Conv2d(channels, 4, 1)).eval()
    return nn.Sequential(nn.Linear(3, channels), norm, nn.Linear(channels, 4)).eval()


def outcome_of(step: Step) -> Outcome:
    """What a planned step does to the outputs."""
    if step.transfer.waits:
        return Outcome.IMAGES
    same = step.transfer in (Transfer.EXACT, Transfer.CENTRE) or step.transfer.fuses
    return Outcome.EXACT if same else Outcome.CLOSE


def _row(source: NormSpec, targets: list[NormSpec], given: nn.Module | None = None) -> Iterator[Conversion]:
    norm = norm_of(source) if given is None else given
    state = source.read(norm)
    layout = "images" if state.channel_dim == 1 else "tokens"
    asked = _Asked(norm, layout)
    try:
        on_vectors = _Asked(norm_of(source, dims=1), "vectors")
    except DataError:  # it takes no vectors
        on_vectors = None
    others = {g: _Asked(norm_of(source, g), layout) for g in (1, CHANNELS)} if source.takes_groups else {}
    for target in targets:
        outcome, why = asked.to(target)
        options: dict[str, Any] = {}
        note = ""
        groups = None if source.groups is None or not target.takes_groups else source.groups(state, None)
        if outcome is Outcome.CLOSE and groups is not None and asked.to(target, groups=groups)[0] is Outcome.EXACT:
            outcome, options, note = Outcome.EXACT, {"groups": groups}, "exact with as many groups as it has"
        elif outcome is Outcome.CLOSE:
            exact = [g for g, other in others.items() if other.to(target)[0] is Outcome.EXACT]
            told = {1: "exact from one group", CHANNELS: "exact from one channel a group"}
            note = ", ".join(told[g] for g in exact)
        elif outcome is Outcome.REFUSED and on_vectors is not None:
            there = on_vectors.to(target)[0]
            note = f"{there} on vectors (N, C)" if there is not Outcome.REFUSED else ""
        yield Conversion(source.name, target.name, outcome, layout, options, note, why)


class _Asked:
    """One small network, looked into once and asked for many targets."""

    def __init__(self, norm: nn.Module, layout: str) -> None:
        self.net, self.inputs = network_of(norm, layout), torch.zeros(INPUTS[layout])
        self.inventory = inspect(self.net, self.inputs)
        self.source = self.inventory.layers[0].spec.name

    def to(self, target: NormSpec, groups: int | None = None) -> tuple[Outcome, str]:
        """The outcome, and for a refusal the reason."""
        why = ""
        for missing in MISSING_STATISTICS:  # an error first
            try:
                return outcome_of(self._step(target, groups, missing)), ""
            except PlanError as error:
                why = why or "; ".join(p.partition(": ")[2] for p in error.problems)
        return Outcome.REFUSED, why

    def _step(self, target: NormSpec, groups: int | None, missing: str) -> Step:
        options = PlanOptions(
            target.name, groups=groups, sources=[self.source], example_inputs=self.inputs, missing_statistics=missing
        )
        return planned(self.net, options, self.inventory).steps[0]
