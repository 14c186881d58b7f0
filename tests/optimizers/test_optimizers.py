"""An optimizer built before a conversion trains the converted network as if it had been built for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from normswap.norms.frozen import FrozenBatchNorm
from tests.helpers import randomized, relative

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """A convolution without a bias and one with, each with its BN; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def two() -> Any:
    return randomized(Two())


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.0, "momentum": 0.9, **options})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 3) -> None:
    """Steps in the mode that the model is in; its loss is not linear, so that gradients differ from step to step."""
    for i in range(times):
        optimizer.zero_grad()
        (model(X + i) ** 3).mean().backward()
        optimizer.step()


def held_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {p: n for n, p in model.named_parameters()}
    return [[names.get(p, "?") for p in group["params"]] for group in optimizer.param_groups]


def bare(model: nn.Module) -> nn.Module:
    """Every GroupNorm as the per-channel map that it is for channels of mean 0 and variance 1: the original, refolded.

    With eps a GroupNorm divides such channels by sqrt(1 + eps).
    """

    class Map(nn.Module):
        def __init__(self, norm: nn.GroupNorm) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight / (1 + self.eps) ** 0.5 if self.eps > 0.1 else self.weight
            return x * w.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    for name in ("bn1", "bn2"):
        if isinstance(getattr(model, name), nn.GroupNorm):
            setattr(model, name, Map(getattr(model, name)))
    return model


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.0, eps=1e-20),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.9, centered=True, eps=1e-20),
}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "gn": {"to": "gn", "groups": 2},
    "soft": {"to": "gn", "groups": 2, "eps": 1.0},
    "fused": {"to": "fused"},
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_training_in_the_new_parametrisation_would_have_made_it(name: str, conversion: str) -> None:
    """At a learning rate of 0 nothing moves, so the state is a function of the gradients alone."""
    model = two()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    converted: Any = normswap.convert(model, **CONVERSIONS[conversion])
    other = bare(copy.deepcopy(converted))
    expected = OPTIMIZERS[name](other.parameters())
    step(other, expected)
    report = normswap.remap_optimizer(optimizer, model, converted)
    carried = 0
    for (path, mine), theirs in zip(converted.named_parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[mine].items() if mine in optimizer.state else ():
            if isinstance(value, Tensor) and value.dim():
                carried += 1
                assert relative(expected.state[theirs][key], value) < 2e-4, (path, key)
            else:
                assert value == expected.state[theirs][key], (path, key)
    assert carried
    assert "conv1.weight" in report.rescaled
    assert "conv2.bias" in report.rescaled
    assert "head.weight" in report.kept
    assert not report.restarted


def test_the_next_step_of_sgd_is_the_originals_in_the_new_scale() -> None:
    """`W' = W s` moves by `lr m / s`: an update of the original's momentum, seen through the fold."""
    model = two()
    optimizer = sgd(model)
    step(model, optimizer)
    momentum = optimizer.state[model.conv1.weight]["momentum_buffer"].clone()
    sigma = (model.bn1.running_var + model.bn1.eps).sqrt()
    converted: Any = normswap.convert(model, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, model, converted)
    before = converted.conv1.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    converted.conv1.weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert relative(-0.1 * 0.9 * momentum * sigma.view(-1, 1, 1, 1), converted.conv1.weight - before) < 1e-4


@pytest.mark.parametrize("inplace", [False, True])
def test_no_duplicates_old_gone_new_there_kept_ones_kept_order_stable(inplace: bool) -> None:
    model = two()
    optimizer = sgd(model)
    old = list(model.parameters())
    step(model, optimizer)
    converted = normswap.convert(model, to="gn", groups=2, inplace=inplace)
    report = normswap.remap_optimizer(optimizer, model, converted)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(old) + 1
    assert set(held) == set(converted.parameters())
    assert inplace or set(held).isdisjoint(old)
    assert set(optimizer.state) <= set(held)
    order = "conv1.weight bn1.weight bn1.bias conv1.bias conv2.weight conv2.bias bn2.weight bn2.bias"
    assert held_names(optimizer, converted) == [[*order.split(), "head.weight", "head.bias"]]
    assert report.added == ("conv1.bias",)
    assert report.rescaled == ("conv1.weight", "conv2.weight", "conv2.bias")
    assert report.removed == report.left_out == report.notes == ()
    converted.train()
    step(converted, optimizer)


def test_in_place_and_not_in_place_agree() -> None:
    states = []
    start = two()
    for inplace in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        step(model, optimizer)
        converted = normswap.convert(model, to="fused", inplace=inplace)
        normswap.remap_optimizer(optimizer, model, converted)
        states.append((held_names(optimizer, converted), optimizer.state_dict()))
    assert states[0][0] == states[1][0]
    assert str(states[0][1]) == str(states[1][1])


def test_an_old_gradient_is_not_used_after_a_conversion_in_place() -> None:
    model = two()
    optimizer = sgd(model)
    model(X).sum().backward()
    normswap.convert(model, to="gn", groups=2, inplace=True)
    normswap.remap_optimizer(optimizer, model, model)
    assert model.conv1.weight.grad is None
    assert model.head.weight.grad is not None


# --- groups ---------------------------------------------------------------------------------------------------------


def _decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights that decay, and vectors that do not, each group with a rate of its own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": 0.1, "lr": 0.01, "mine": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "lr": 0.02, "mine": "vectors"},
    ]


def test_a_new_bias_goes_to_the_group_of_beta_and_options_stay() -> None:
    model = two()
    optimizer = torch.optim.AdamW(_decay_groups(model))
    converted = normswap.convert(model, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, model, converted)
    names = held_names(optimizer, converted)
    assert names[0] == ["conv1.weight", "conv2.weight", "head.weight"]
    assert names[1] == ["bn1.weight", "bn1.bias", "conv1.bias", "conv2.bias", "bn2.weight", "bn2.bias", "head.bias"]
    assert [(g["lr"], g["weight_decay"], g["mine"]) for g in optimizer.param_groups] == [
        (0.01, 0.1, "matrices"),
        (0.02, 0.0, "vectors"),
    ]


def test_what_the_optimizer_did_not_hold_stays_out() -> None:
    model = two()
    optimizer = torch.optim.SGD([*model.conv2.parameters(), *model.bn1.parameters()], lr=0.1)
    converted = normswap.convert(model, to="gn", groups=2)
    report = normswap.remap_optimizer(optimizer, model, converted)
    assert held_names(optimizer, converted) == [["conv2.weight", "conv2.bias", "bn1.weight", "bn1.bias"]]
    assert report.left_out == ("conv1.bias",)


def test_what_is_not_of_the_network_stays_with_its_state() -> None:
    model, loss = two(), nn.Linear(5, 5)
    optimizer = sgd(nn.ModuleList([model, loss]))
    optimizer.zero_grad()
    loss(model(X)).sum().backward()
    optimizer.step()
    before = optimizer.state[loss.weight]["momentum_buffer"]
    normswap.remap_optimizer(optimizer, model, normswap.convert(model, to="gn", groups=2))
    assert optimizer.state[loss.weight]["momentum_buffer"] is before
    assert optimizer.param_groups[0]["params"][-2:] == list(loss.parameters())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_empty_group_stays_and_breaks_neither_steps_nor_schedulers(inplace: bool) -> None:
    model = two()
    norms = [*model.bn1.parameters(), *model.bn2.parameters()]
    rest = [p for p in model.parameters() if all(p is not n for n in norms)]
    optimizer = torch.optim.SGD([{"params": norms}, {"params": rest}], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=20)
    step(model, optimizer, 1)
    converted = normswap.convert(model, to="frozen", inplace=inplace)
    report = normswap.remap_optimizer(optimizer, model, converted)
    assert report.removed == ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
    assert report.notes == ("group 0 has no parameters now",)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 5]
    for _ in range(5):
        step(converted, optimizer, 1)
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert scheduler.get_last_lr()[1] == optimizer.param_groups[1]["lr"]


def test_gamma_and_beta_that_were_buffers_join_the_layers_beside_them() -> None:
    model = two()
    model.bn1, model.bn2 = FrozenBatchNorm(8), FrozenBatchNorm(8)
    randomized(model)
    stages = [{"params": list(m.parameters()), "lr": lr} for m, lr in ((model.conv1, 0.1), (model.conv2, 0.2))]
    optimizer = torch.optim.SGD(stages)
    converted = normswap.convert(model, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, model, converted)
    assert [set(names) for names in held_names(optimizer, converted)] == [
        {"conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"},
        {"conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias"},
    ]


def test_several_optimizers_are_remapped_together() -> None:
    model = two()
    first = torch.optim.SGD([*model.conv1.parameters(), *model.bn1.parameters()], lr=0.1)
    second = torch.optim.Adam([*model.conv2.parameters(), *model.bn2.parameters(), *model.head.parameters()])
    converted = normswap.convert(model, to="gn", groups=2)
    report = normswap.remap_optimizer([first, second], model, converted)
    held = [p for o in (first, second) for p in o.param_groups[0]["params"]]
    assert len(held) == len(set(held)) == len(list(converted.parameters()))
    assert report.added == ("conv1.bias",)
    assert "conv1.bias" in held_names(first, converted)[0]


def test_names_that_an_optimizer_keeps_stay_beside_their_parameters() -> None:
    model = two()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch does not keep names")
    converted = normswap.convert(model, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, model, converted)
    assert [optimizer.param_groups[0]["param_names"]] == held_names(optimizer, converted)


# --- states that cannot be carried over -----------------------------------------------------------------------------


class Foreign(torch.optim.Optimizer):
    """Momentum under a name of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.mul_(0.9).add_(p.grad)
                    p.add_(velocity, alpha=-group["lr"])


@pytest.mark.parametrize("build", [Foreign, torch.optim.Adafactor], ids=["foreign", "adafactor"])
def test_a_state_of_unknown_scale_is_dropped_for_folded_weights_alone(build: Any) -> None:
    model = two()
    optimizer = build(model.parameters())
    step(model, optimizer)
    kept = optimizer.state[model.head.weight]
    converted: Any = normswap.convert(model, to="gn", groups=2)
    report = normswap.remap_optimizer(optimizer, model, converted)
    assert report.restarted == ("conv1.weight", "conv2.weight", "conv2.bias")
    assert "conv1.weight and 2 more without state: how" in str(report)
    assert optimizer.state[converted.head.weight] == kept
    assert converted.conv1.weight not in optimizer.state
    step(converted, optimizer)


@pytest.mark.parametrize("inplace", [False, True])
def test_without_a_record_of_the_fold_its_weights_start_anew(inplace: bool) -> None:
    model = two()
    optimizer = sgd(model)
    step(model, optimizer)
    converted = normswap.convert(model, to="gn", groups=2, undo=False, inplace=inplace)
    report = normswap.remap_optimizer(optimizer, model, converted)
    assert report.restarted == ("conv1.weight", "conv2.weight", "conv2.bias")
    assert report.added == ("conv1.bias",)
    assert "bn1.weight" in report.kept


def test_what_vanished_in_place_without_a_record_is_an_error() -> None:
    model = two()
    optimizer = sgd(model)
    normswap.convert(model, to="frozen", undo=False, inplace=True)
    with pytest.raises(OptionError, match="not known"):
        normswap.remap_optimizer(optimizer, model, model)


def test_a_gamma_set_to_zero_or_reset_starts_anew() -> None:
    model = two()
    optimizer = sgd(model)
    step(model, optimizer)
    report = normswap.remap_optimizer(optimizer, model, normswap.convert(model, "gn", groups=2, transfer="reset"))
    assert report.restarted == ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")


def test_conversions_one_after_another_multiply() -> None:
    model = two()
    optimizer = sgd(model)
    step(model, optimizer)
    momentum = optimizer.state[model.conv1.weight]["momentum_buffer"].clone()
    sigma = (model.bn1.running_var + model.bn1.eps).sqrt().view(-1, 1, 1, 1)
    synced = normswap.convert(model, to="sync")
    converted: Any = normswap.convert(synced, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, model, converted)
    assert relative(momentum * sigma, optimizer.state[converted.conv1.weight]["momentum_buffer"]) < 1e-5


def test_a_root_that_is_itself_a_norm() -> None:
    model = randomized(nn.BatchNorm2d(3))
    optimizer = sgd(model)
    converted: Any = normswap.convert(model, to="gn", groups=1)
    normswap.remap_optimizer(optimizer, model, converted)
    assert set(optimizer.param_groups[0]["params"]) == set(converted.parameters())


def test_wrapped_networks_and_shared_parameters() -> None:
    model = two()
    model.bn2.weight = model.bn1.weight
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    optimizer = sgd(wrapped)
    converted = normswap.convert(wrapped.module, to="gn", groups=2)
    normswap.remap_optimizer(optimizer, wrapped, nn.DataParallel(converted))
    held = optimizer.param_groups[0]["params"]
    assert len(held) == len(set(held))
    assert set(held) == set(converted.parameters())


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_come_before_anything_is_changed() -> None:
    model = two()
    converted = normswap.convert(model, to="gn", groups=2)
    good, bad = sgd(model), torch.optim.LBFGS(model.parameters())
    before = list(good.param_groups[0]["params"])
    with pytest.raises(OptionError, match="LBFGS"):
        normswap.remap_optimizer([good, bad], model, converted)
    assert all(a is b for a, b in zip(good.param_groups[0]["params"], before, strict=True))
    with pytest.raises(OptionError, match="was not made by normswap"):
        normswap.remap_optimizer(good, converted, model)
    with pytest.raises(OptionError, match="holds no parameter of the original"):
        normswap.remap_optimizer(sgd(nn.Linear(2, 2)), model, converted)
    with pytest.raises(OptionError, match="Optimizer or several, got a str"):
        normswap.remap_optimizer(["sgd"], model, converted)  # type: ignore[list-item]
    with pytest.raises(OptionError, match="got none"):
        normswap.remap_optimizer([], model, converted)
    with pytest.raises(OptionError, match="not converted from the first"):
        normswap.remap_optimizer(sgd(converted), converted, copy.deepcopy(converted))


@pytest.mark.parametrize("inplace", [False, True])
def test_remapping_twice_is_an_error(inplace: bool) -> None:
    model = two()
    optimizer = sgd(model)
    converted = normswap.convert(model, to="gn", groups=2, inplace=inplace)
    normswap.remap_optimizer(optimizer, model, converted)
    with pytest.raises(OptionError, match="already"):
        normswap.remap_optimizer(optimizer, model, converted)


def test_an_optimizer_of_nothing_but_norms_that_vanish_is_an_error() -> None:
    model = two()
    optimizer = torch.optim.SGD([*model.bn1.parameters(), *model.bn2.parameters()], lr=0.1)
    converted = normswap.convert(model, to="frozen")
    with pytest.raises(OptionError, match="none of the parameters that the optimizer holds trains"):
        normswap.remap_optimizer(optimizer, model, converted)


def test_the_report_is_json_and_readable() -> None:
    model = two()
    report = normswap.remap_optimizer(sgd(model), model, normswap.convert(model, to="gn", groups=2))
    assert json.loads(json.dumps(report.to_dict()))["added"] == ["conv1.bias"]
    assert str(report) == "parameters: 6 kept, 3 rescaled, 1 added"
