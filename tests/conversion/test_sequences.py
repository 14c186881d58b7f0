"""Norms between recurrent layers: padding changes nothing else, and where it would, a warning says so."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers import randomized, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normswap
from normswap.norms._padded import PaddedGroupNorm, PaddedInstanceNorm1d
from normswap.planning.plan import Plan

C, T = 8, 6
LENGTHS = torch.tensor([4, 6, 2])


class Sequential(nn.Module):
    """`(N, T, C)` and lengths -> `(N, T, 3)`, with `(N, C, T)` for the norm behind each recurrent layer.

    packed: with lengths; value: of padded steps; added: to all steps before the norms.
    """

    def __init__(self, *, packed: bool = True, value: float = 0.0, added: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.GRU(C, C, batch_first=True), nn.LSTM(C, C, batch_first=True)])
        self.norms = nn.ModuleList([randomized(nn.BatchNorm1d(C)) for _ in self.layers])
        self.head = nn.Linear(C, 3)
        self.packed, self.value, self.added = packed, value, added

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if self.packed:
                made, _ = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
                x = pad_packed_sequence(made, True, self.value, total_length=x.shape[1])[0]
            else:
                x = layer(x)[0]
            x = x + self.added if self.added else x
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


class Steps(nn.Module):
    """Norms of `(T * N, C)`, as DeepSpeech's SequenceWise makes them, and of a packed sequence's data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(C, C, bidirectional=True), nn.GRU(C, C)
        self.wise, self.within = randomized(nn.BatchNorm1d(C)), randomized(nn.BatchNorm1d(C))
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps, n = x.shape[1], x.shape[0]
        made, _ = self.first(pack_padded_sequence(x.transpose(0, 1), lengths, enforce_sorted=False))
        y = pad_packed_sequence(made, total_length=steps)[0].view(steps, n, 2, C).sum(2)
        y = self.wise(y.view(steps * n, C)).view(steps, n, C)
        packed = pack_padded_sequence(y, lengths, enforce_sorted=False)
        made, _ = self.second(packed._replace(data=self.within(packed.data)))
        return self.head(pad_packed_sequence(made, total_length=steps)[0].transpose(0, 1))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(len(LENGTHS), T, C, generator=torch.Generator().manual_seed(seed)), LENGTHS


@torch.no_grad()
def apart(model: nn.Module) -> float:
    """How far a sequence's output in a padded batch is from what it is alone."""
    x, lengths = inputs(1)
    together = model(x, lengths)
    alone = [model(x[i : i + 1, :n], lengths[i : i + 1])[0] for i, n in enumerate(lengths.tolist())]
    return max(relative(one, together[i, : len(one)]) for i, one in enumerate(alone))


def converted(model: nn.Module, to: str = "gn", **options: object) -> nn.Module:
    options |= {"groups": 2} if to == "gn" else {}
    return normswap.convert(model.eval(), to, example_inputs=inputs(), **options)


@pytest.mark.parametrize("kind", [PaddedGroupNorm, PaddedInstanceNorm1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_steps_before_the_padding(kind: type[nn.Module], dtype: torch.dtype) -> None:
    groups = 2 if kind is PaddedGroupNorm else C
    norm = (kind(2, C) if kind is PaddedGroupNorm else kind(C, affine=True)).to(dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(3, C, T).to(dtype) * 2 + 1
    for i, n in enumerate(LENGTHS.tolist()):
        x[i, :, n:] = 0
    y = norm(x)
    for i, n in enumerate(LENGTHS.tolist()):
        expected = F.group_norm(x[i : i + 1, :, :n].float(), groups, norm.weight.float(), norm.bias.float(), norm.eps)
        assert relative(expected[0], y[i, :, :n]) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert torch.equal(y[i, :, n:], norm.bias[:, None].expand(C, T - n))


def test_a_step_of_zeros_within_a_sequence_is_no_padding() -> None:
    x = torch.randn(1, C, T)
    x[:, :, 2] = 0
    assert relative(F.group_norm(x, 2), PaddedGroupNorm(2, C, affine=False)(x)) < 1e-6


@pytest.mark.parametrize("transfer", ["fold", "copy"])
@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel", "frozen"])
def test_padding_does_not_change_a_sequence(to: str, transfer: str) -> None:
    assert apart(converted(Sequential(), to, transfer=transfer if to != "frozen" else "fold")) < 1e-5


@pytest.mark.parametrize("to", ["gn", "ln", "ln-channel"])
def test_norms_of_single_steps_know_no_padding(to: str) -> None:
    assert apart(converted(Steps(), to)) < 1e-5


@pytest.mark.parametrize("options", [{"packed": False}, {"value": 1.0}, {"added": 0.5}])
def test_where_padding_cannot_be_told_a_warning_names_the_norm_and_the_way_out(options: dict[str, float]) -> None:
    with pytest.warns(UserWarning, match=r"norms\.0 takes statistics over time.*\(and 1 more.*ln-channel"):
        model = converted(Sequential(**options))
    assert not any(isinstance(m, PaddedGroupNorm) for m in model.modules())
    converted(Sequential(**options), "ln-channel")  # warnings are errors


def test_without_inputs_to_run_on_the_warning_comes_too() -> None:
    with pytest.warns(UserWarning, match=r"norms\.0 takes statistics over time"):
        normswap.convert(Sequential().eval(), "gn", groups=2, check=False)


def test_norms_before_packed_sequences_are_warned_of() -> None:
    class Fronted(Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv1d(C, C, 3, padding=1), randomized(nn.BatchNorm1d(C)))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(self.front(x.transpose(1, 2)).transpose(1, 2), lengths)

    with pytest.warns(UserWarning, match=r"^front\.1 takes statistics over time, .* changes them; ln-channel"):
        model = converted(Fronted())
    assert isinstance(model.norms[0].norm, PaddedGroupNorm)


class Masked(nn.Module):
    """Convolutions along time and the mean of the steps that the mask leaves."""

    def __init__(self, *, dims: int = 1) -> None:
        super().__init__()
        kind, norms = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
        self.first, self.second = (nn.Sequential(kind(C, C, 1), randomized(norms(C))) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(C, C), randomized(nn.BatchNorm1d(C)))

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.second(self.first(x * mask) * mask) * mask
        return self.head(x.flatten(2).sum(2) / mask.flatten(2).sum(2))


class WithLengths(Masked):
    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        return self.read(x, (torch.arange(x.shape[-1]) < x_lens[:, None])[:, None].to(x.dtype))


class WithMask(Masked):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.read(x, attention_mask[:, None].to(x.dtype))


class WithNeither(Masked):
    def forward(self, x: Tensor, max_len: Tensor) -> Tensor:
        return self.read(x, torch.ones_like(x[:, :1]) * (max_len > 0))


@pytest.mark.parametrize(
    ("to", "given"),
    [
        (to, given)
        for to in ("gn", "ln", "in", "ln-channel", "frozen")
        for given in (True, False)
        if to != "in" or given
    ],
)
@pytest.mark.parametrize("kind", [WithLengths, WithMask])
def test_lengths_or_a_mask_without_a_recurrent_layer_are_warned_of_once(
    kind: type[Masked], given: bool, to: str
) -> None:
    x = torch.randn(3, C, T)
    second = LENGTHS if kind is WithLengths else torch.arange(T) < LENGTHS[:, None]
    options = {"groups": 2} if to == "gn" else {}
    rules = {"head.*": "keep", "*": to}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        normswap.convert(
            kind().eval(), rules=rules, example_inputs=(x, second) if given else None, check=given, **options
        )
    told = [str(each.message) for each in seen]
    if to in ("gn", "ln", "in"):
        assert [t.startswith("first.1 takes statistics over time") and "(and 1 more norm)" in t for t in told] == [True]
    else:
        assert told == []


def test_vectors_of_a_masked_network_are_not_counted_among_the_norms_over_time() -> None:
    plan = normswap.plan(WithLengths().eval(), "gn", groups=2, example_inputs=(torch.randn(3, C, T), LENGTHS))
    assert plan.meta["padding"] == ["first.1", "second.1"]


def test_images_with_a_mask_and_arguments_that_are_no_lengths_are_not_warned_of() -> None:
    images, mask = torch.randn(2, C, 4, 4), torch.ones(2, 4, 4)
    for model, x, second in [(WithMask(dims=2), images, mask), (WithNeither(), torch.randn(2, C, T), torch.tensor(4))]:
        assert "padding" not in normswap.plan(model.eval(), "gn", groups=2, example_inputs=(x, second)).meta


def test_images_before_a_recurrent_layer_are_not_warned_of() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, C, 3), randomized(nn.BatchNorm2d(C)))
            self.gru = nn.GRU(C, C, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(self.conv(x).mean(2).transpose(1, 2))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.convert(Reader().eval(), "gn", groups=2, example_inputs=torch.randn(1, 3, 8, 8))


def test_calibration_matches_the_moments_of_valid_steps() -> None:
    torch.manual_seed(0)
    model = Sequential()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(2)
    model.eval()
    new = converted(model)
    data = [((inputs(seed)), torch.zeros(len(LENGTHS), dtype=torch.long)) for seed in range(3)]
    normswap.calibrate(new, reference=model, data=data)
    valid = torch.arange(T) < LENGTHS[:, None]

    def moments(network: nn.Module, index: int) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = network.norms[index].register_forward_hook(lambda m, a, out: seen.append(out.movedim(1, 2)[valid]))
        for args, _ in data:
            network(*args)
        hook.remove()
        return torch.cat(seen).mean(0), torch.cat(seen).var(0)

    with torch.no_grad():
        for index in range(2):
            for mine, theirs in zip(moments(new, index), moments(model, index), strict=True):
                assert relative(theirs, mine) < 1e-4


def test_a_saved_network_leaves_padding_out_and_reverts(tmp_path: Path) -> None:
    model = Sequential().eval()
    new = converted(model)
    file = normswap.save(new, tmp_path / "new.safetensors")
    loaded = normswap.load(file, model=copy.deepcopy(model))
    assert torch.equal(loaded(*inputs(2)), new(*inputs(2)))
    assert isinstance(loaded.norms[1].norm, PaddedGroupNorm)
    assert torch.equal(normswap.revert(loaded)(*inputs(2)), model(*inputs(2)))


def test_the_plan_says_so_and_goes_to_json_and_back() -> None:
    plan = normswap.plan(Sequential().eval(), "gn", groups=2, example_inputs=inputs())
    assert [step.padded for step in plan.steps] == [True, True]
    assert Plan.from_json(plan.to_json()) == plan
    assert "padding left out" in str(plan)
    other = normswap.plan(Sequential().eval(), "ln-channel", example_inputs=inputs())
    assert not any("padded" in step for step in other.to_dict()["steps"])


def test_converted_again_it_still_leaves_padding_out() -> None:
    again = converted(converted(Sequential()), "in", sources=["gn"])
    assert isinstance(again.norms[0].norm, PaddedInstanceNorm1d)
    assert apart(again) < 1e-5
