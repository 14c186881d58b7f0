"""A way that no run took is a way: what it reads is not folded into."""

from __future__ import annotations

import pytest
import torch
from helpers import MODES, Net, Residual, X, edges, fingerprint, look, randomized, relative
from torch import Tensor, nn

import normswap
from normswap.inspection.inventory import inspect


class Domains(Net):
    """Another norm for adversarial images."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.BatchNorm2d(4)
        self.adv = False

    def forward(self, x: Tensor) -> Tensor:
        return (self.aux if self.adv else self.bn)(self.conv(x))


class DomainsBuilt(Net):
    """The flag made the second norm, and chooses between the two all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.adv = True
        if self.adv:
            self.aux = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.aux if self.adv else self.bn)(self.conv(x))


class DomainsByName(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleDict({"b": nn.BatchNorm2d(4), "a": nn.BatchNorm2d(4)})
        self.domain = "a"
        del self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](self.conv(x))


class DomainsByNumber(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.domain = 0
        del self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](self.conv(x))


class NormOrNothing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ModuleDict({"norm": self.bn, "none": nn.Identity()})
        self.kind = 0
        del self.bn

    def forward(self, x: Tensor) -> Tensor:
        return list(self.after.values())[self.kind](self.conv(x))


class Raw(Net):
    """Set later, it gives raw features."""

    raw = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.raw:
            return y
        return self.bn(y)


class RawByWord(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gives = "normed"

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.gives == "raw" else self.bn(y)


class RawInBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Raw()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).relu()


class AuxiliaryHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        return (self.bn(y), self.head(y)) if self.training else self.bn(y)


class RawArgument(Net):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        if raw:
            return y
        return self.bn(y)


class BranchOnData(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.mean() > 100:
            return self.bn(y) + y
        return self.bn(y)


class BranchOnDataInBlock(RawInBlock):
    def __init__(self) -> None:
        super().__init__()
        self.block = BranchOnData()


class NormedOrNot(Net):
    """The norm reads what the convolution gives, or the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.first = False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x)) if self.first else self.bn(self.conv(x))


ANOTHER = [
    (Domains, "with adv=True, the output of conv is used elsewhere too"),
    (DomainsBuilt, "no run of the network showed what feeds bn, which may be conv"),
    (DomainsByName, "no run of the network showed what feeds bns.b, which may be conv"),
    (DomainsByNumber, "no run of the network showed what feeds bns.1, which may be conv"),
    (NormOrNothing, "no run of the network called after.none, which may stand in its place"),
    (Raw, "with raw=True, the output of conv is used elsewhere too"),
    (RawByWord, "with gives='raw', the output of conv is used elsewhere too"),
    (RawInBlock, "with raw=True, the output of block.conv is used elsewhere too"),
    (AuxiliaryHead, "with training=True, the output of conv is used elsewhere too"),
    (RawArgument, "on another branch of its code, the output of conv is used elsewhere too"),
    (BranchOnData, "the output of conv is used elsewhere too"),
    (BranchOnDataInBlock, "the output of block.conv is used elsewhere too"),
    (NormedOrNot, "with first=True, its input is another"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "reason"), ANOTHER)
def test_what_another_way_reads_is_not_folded_into(case: type[nn.Module], reason: str, mode: str) -> None:
    net = randomized(case())
    before = fingerprint(net)
    found = [layer.feed for layer in look(net, mode).layers]
    assert [feed.producers for feed in found] == [()] * len(found)
    reasons = {feed.reason for feed in found}
    assert reason in " ".join(reasons)
    assert fingerprint(net) == before


def bare(net: nn.Module, original: nn.Module) -> nn.Module:
    """The converted network with the original's norms on what its own norms are given, which must compute the same."""
    for step in net._normswap.plan.steps:
        norm = net.get_submodule(step.path)
        assert step.transfer == "prescale"
        weight, bias = (t.detach().view(1, -1, 1, 1) for t in (norm.norm.weight, norm.norm.bias))
        norm.norm.forward = lambda x, w=weight, b=bias: x * w + b
    return net


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("case", "setting"),
    [(Domains, ("adv", True)), (DomainsByName, ("domain", "b")), (Raw, ("raw", True)), (RawByWord, ("gives", "raw")),
     (AuxiliaryHead, ("training", True))],
)  # fmt: skip
def test_the_converted_network_is_the_original_on_the_other_way_too(
    case: type[nn.Module], setting: tuple[str, object], given: bool
) -> None:
    net = randomized(case())
    new = bare(normswap.convert(net, to="ln", example_inputs=X if given else None), net)
    for each in (net, new):
        each.eval()
        setattr(each, *setting)
    a, b = net(X), new(X)
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    assert all(relative(x, y) < 1e-5 for x, y in pairs)


def test_the_plan_says_which_layers_are_prescaled_and_why() -> None:
    steps = normswap.plan(Domains().eval(), to="ln").steps
    assert [(step.path, step.transfer) for step in steps] == [("bn", "prescale"), ("aux", "prescale")]
    assert steps[0].note == "with adv=True, the output of conv is used elsewhere too"


# --- no more doubt than there is ---------------------------------------------------------------------------------


class Switches(Net):
    """Flags that change nothing about who reads the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.activate, self.mode, self.deploy, self.checked = True, "relu", False, True

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        if self.deploy:
            return self.fused(x)
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1))
        if self.checked and x.size(2) != x.size(3):
            raise ValueError("not square")
        y = self.bn(self.conv(x))
        if self.training:
            y = nn.functional.dropout(y, 0.1)
        if not self.activate:
            return y
        return y.relu() if self.mode == "relu" else y.sigmoid()


class Built(nn.Module):
    """A flag by which the constructor has made the norm: without it there would be none to skip."""

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv = nn.Conv2d(3, 4, 3)
        if self.normalize:
            self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.normalize:
            x = self.bn(x)
        return x


class BuiltByArgument(Built):
    def __init__(self, normalize: bool = True) -> None:
        nn.Module.__init__(self)
        self.normalize, self.conv = normalize, nn.Conv2d(3, 4, 3)
        if normalize:
            self.bn = nn.BatchNorm2d(4)


class OtherSizes(Net):
    """A spare norm that this convolution cannot feed: of other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.BatchNorm2d(5)


class SparePart(Net):
    """A part that no run reaches, with a layer of its own for its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class LoopsOnTheConvolution(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        while z.mean() > 1e9:
            z = z / y
        return z


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [Switches, Built, BuiltByArgument, OtherSizes, SparePart])
def test_ways_that_read_nothing_else_cost_no_fold(case: type[nn.Module], mode: str) -> None:
    assert edges(case(), mode) == {"bn": ("conv",)}


def test_a_loop_on_the_data_ends_in_doubt() -> None:
    assert edges(LoopsOnTheConvolution(), "symbolic") == {}


def test_a_way_that_skips_the_shortcut_leaves_the_last_norm_of_the_branch() -> None:
    class Optional(Residual):
        shortcut = True

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return x + y if self.shortcut else y

    assert inspect(Optional().eval())["bn2"].feed.last_of_branch
    assert edges(Optional(), "symbolic") == {"bn1": ("conv1",), "bn2": ("conv2",)}


def test_trying_other_ways_leaves_nothing_behind() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.seen, self.log = 0, [0], True

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.seen.append(self.steps)
            y = self.bn(self.conv(x))
            if self.log:
                self.last = y
            return y if y.mean() > 0 else -y

    net = Counting().train()
    before = fingerprint(net)
    assert edges(net.eval(), "symbolic") == {"bn": ("conv",)}
    assert fingerprint(net.train()) == before
    assert torch.equal(torch.tensor(net.seen), torch.tensor([0]))
