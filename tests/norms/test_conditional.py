"""Class-conditional norms: the statistics are folded, and the condition still says gamma and beta."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import grouped, randomized, relative
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.conversion.record import record_of
from normswap.errors import NetworkError, OptionError, PlanError

CLASSES, C = 4, 8


class Held(nn.Module):
    """As SNGAN has it: a norm without gamma and beta, and an embedding that gives them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.embed = nn.Embedding(CLASSES, 2 * channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gamma, beta = self.embed(y).chunk(2, 1)
        return self.bn(x) * (1 + gamma[..., None, None]) + beta[..., None, None]


class Own(nn.Module):
    """As BigGAN has it: the statistics are its own, and it calls the function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-4
        self.gain, self.shift = nn.Embedding(CLASSES, channels), nn.Embedding(CLASSES, channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, shift = 1 + self.gain(y)[..., None, None], self.shift(y)[..., None, None]
        z = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, self.eps)
        return z * gain + shift


class Channelwise(Own):
    """With a gamma and beta of its own instead of a condition."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, self.eps)
        return z * self.gain.weight[0][:, None, None] + self.shift.weight[0][:, None, None]


class Generator(nn.Module):
    """`(N, 3, H, W)` and classes `(N,)` -> `(N, 3, H, W)`, with a norm behind a convolution and one behind a sum."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, C, 3, padding=1), kind(C)
        self.inner, self.second = nn.Conv2d(C, C, 1), kind(C)
        self.out = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.first(self.stem(x), y))
        return self.out(F.relu(self.second(h + self.inner(h), y)))


def inputs(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomized(Generator(kind)).train()
    with torch.no_grad():
        model.stem.weight.mul_(torch.logspace(-1, 1, C).roll(3)[:, None, None, None])
        for _ in range(40):
            model(*inputs())
    return model.eval()


def split(model: nn.Module, kind: type[nn.Module] = Own) -> nn.Module:
    normswap.split_norm(model, kind, mean="stored_mean", var="stored_var")
    return model


CONDITIONAL = {"held": lambda: network(Held), "own, split": lambda: split(network(Own))}


@pytest.mark.parametrize("made", CONDITIONAL.values(), ids=CONDITIONAL)
@pytest.mark.parametrize("to", ["gn", "in", "fused"])
def test_it_is_folded_saved_and_reverted_with_its_condition(made, to: str, tmp_path: Path) -> None:
    model = made()
    groups = {"groups": 2} if to == "gn" else {}
    new = normswap.convert(model, to, example_inputs=inputs(1), **groups)
    assert record_of(new).check.passed
    transfers = [str(step.transfer) for step in record_of(new).plan.steps]
    assert transfers == (["fuse", "affine"] if to == "fused" else ["fold", "prescale"])
    before = relative(model(*inputs(2)), new(*inputs(2)))
    if to == "gn":
        normswap.calibrate(new, reference=model, data=[(inputs(seed), inputs(seed)[1]) for seed in range(4)])
        assert relative(model(*inputs(2)), new(*inputs(2))) < 0.7 * before
    loaded = normswap.load(normswap.save(new, tmp_path / "new.safetensors"), model=copy.deepcopy(model))
    assert torch.equal(loaded(*inputs(2)), new(*inputs(2)))
    assert torch.equal(normswap.revert(new)(*inputs(2)), model(*inputs(2)))


@pytest.mark.parametrize(("kind", "child"), [(Held, "bn"), (Own, "norm")])
def test_the_new_norm_is_a_group_norm_with_the_gamma_and_beta_of_each_class(kind: type[nn.Module], child: str) -> None:
    model = network(kind) if kind is Held else split(network(kind))
    bn = getattr(model.first, child)
    new = normswap.convert(model, "gn", groups=2, example_inputs=inputs(1))
    x, y = inputs(3)
    made = model.stem(x).double()
    made = (made - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    gamma, beta = model.first.embed(y).chunk(2, 1) if kind is Held else (model.first.gain(y), model.first.shift(y))
    expected = grouped(made, 2, 1e-5) * (1 + gamma[..., None, None]) + beta[..., None, None]
    seen: list[Tensor] = []
    new.first.register_forward_hook(lambda module, args, out: seen.append(out))
    new(x, y)
    assert relative(expected, seen[0]) < 1e-5


def test_a_class_with_statistics_of_its_own_is_refused_until_it_is_split() -> None:
    model = network(Own)
    with pytest.raises(PlanError, match="Own holds stored_mean and stored_var"):
        normswap.convert(model, "gn", groups=2, example_inputs=inputs())
    assert normswap.split_norm(model, Own, mean="stored_mean", var="stored_var") == 2
    normswap.convert(model, "gn", groups=2, example_inputs=inputs())


def test_splitting_changes_neither_outputs_nor_training_nor_names_of_parameters() -> None:
    model = network(Own)
    other = split(copy.deepcopy(model))
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert isinstance(other.first, Own)
    assert relative(model(*inputs(2)), other(*inputs(2))) < 1e-6
    for _ in range(2):
        one, two = model.train()(*inputs(4)), other.train()(*inputs(4))
        assert relative(one, two) < 1e-5
    assert torch.allclose(model.first.stored_var, other.first.norm.running_var)
    assert relative(model.eval()(*inputs(2)), other.eval()(*inputs(2))) < 1e-5
    assert not any(key.endswith(("_zeros", "_ones", "stored_mean")) for key in other.state_dict())


@pytest.mark.parametrize("kind", [Own, Channelwise])
def test_the_order_of_channels_is_not_free_where_a_class_gives_each_its_gamma(kind: type[nn.Module]) -> None:
    chain = split(Chained(network(kind)), kind)
    new = normswap.convert(chain, "gn", groups=2, example_inputs=inputs(1))
    before = relative(chain(*inputs(2)), new(*inputs(2)))
    normswap.calibrate(new, reference=chain, data=[(inputs(seed), inputs(seed)[1]) for seed in range(4)])
    assert record_of(new).undo.orders == []
    assert relative(chain(*inputs(2)), new(*inputs(2))) < before


class Chained(nn.Module):
    """A convolution, a norm and a convolution: where a plain norm's channels may change places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.out = model.stem, model.first, model.out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(F.relu(self.first(self.stem(x), y)))


def test_what_cannot_be_split_is_refused_and_nothing_changed() -> None:
    model = network(Own)
    with pytest.raises(NetworkError, match=r"first \(Own\) cannot be split: its buffers running_mean"):
        normswap.split_norm(model, Own)
    assert type(model.first) is Own
    with pytest.raises(NetworkError, match="no module of the class Held"):
        normswap.split_norm(model, Held)
    with pytest.raises(OptionError, match="dims: expected 1, 2 or 3, got 4"):
        normswap.split_norm(model, Own, dims=4)
    with pytest.raises(OptionError, match="cls: expected a class"):
        normswap.split_norm(model, model.first)
    split(model)
    with pytest.raises(NetworkError, match="no module of the class Own"):
        split(model)
