"""Plans: every layer that cannot become what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Net, X, fingerprint
from planned import problems, targets_of
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import PlanError
from normswap.planning.planner import plan

# --- statistics that are needed and not there -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["bn", "sync", "renorm", "frozen", "fused"])
def test_a_target_that_needs_statistics_which_are_not_there_names_calibrate(target: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6))
    error = problems(net, to=target, sources=["gn", "in"])
    assert error.problems == (
        f"1 (GroupNorm): {target} needs running statistics, which gn does not have",
        f"3 (InstanceNorm2d): {target} needs running statistics, which in does not have",
    )
    assert "calibrate" in error.hint
    assert "--calibrate FOLDER" in error.hint


@pytest.mark.parametrize(("to", "transfer"), [("bn", "estimate"), ("frozen", "estimate"), ("fused", "absorb")])
def test_calibration_later_is_allowed_where_the_norm_can_wait_for_it(to: str, transfer: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    (step,) = plan(net, to=to, missing_statistics="later").steps
    assert (step.target, step.transfer, step.producers, step.dims) == (to, transfer, ("0",), 2)


def test_dimensions_that_are_not_known_ask_for_example_inputs() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.SyncBatchNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    error = problems(Blind(), to="bn")
    assert "norm (SyncBatchNorm): whether BatchNorm must be 1d, 2d or 3d is not known; give example inputs" in str(
        error
    )
    shapes = {1: (2, 4), 2: (2, 4, 3, 3), 3: (2, 4, 2, 2, 2)}
    for dims, shape in shapes.items():
        assert plan(Blind().eval(), to="bn", example_inputs=torch.randn(shape)).steps[0].dims == dims


# --- groups of one element ------------------------------------------------------------------------------------------

VECTORS = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("net", [VECTORS, POOLED], ids=["vectors", "pooled"])
@pytest.mark.parametrize("options", [{"to": "in"}, {"to": "gn", "groups": 4}, {"to": "gn", "channels_per_group": 1}])
@pytest.mark.parametrize("transfer", ["fold", "copy", "reset"])
def test_groups_of_one_value_are_refused_from_the_layers_alone(
    net: nn.Module, options: dict[str, Any], transfer: str
) -> None:
    error = problems(net, transfer=transfer, **options)
    assert "each group would be a single value, which erases the data" in str(error)
    assert 'rules={"PATH": "frozen"}' in error.hint


@pytest.mark.parametrize("net", [VECTORS, POOLED], ids=["vectors", "pooled"])
@pytest.mark.parametrize("options", [{"to": "ln"}, {"to": "gn", "groups": 2}, {"to": "ln-channel"}, {"to": "frozen"}])
def test_larger_groups_of_the_same_layers_are_fine(net: nn.Module, options: dict[str, Any]) -> None:
    assert len(plan(net, **options).steps) == 1


class Squeezes(nn.Module):
    """A squeeze-and-excitation branch whose norm reads pooled maps."""

    def __init__(self, pool: Callable[[Tensor], Tensor], dims: int = 2) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Conv2d(4, 4, 1) if dims == 2 else nn.Linear(4, 4)
        self.bn = nn.BatchNorm2d(4) if dims == 2 else nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(self.pool(self.conv(x))).relu())


def fast_pool(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), -1).mean(-1).view(x.size(0), x.size(1), 1, 1)


SQUEEZES = {
    "mean": lambda: Squeezes(lambda x: x.mean((2, 3), keepdim=True)),
    "a pool by hand": lambda: Squeezes(fast_pool),
    "a pool and squeeze": lambda: Squeezes(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 1),
    "amax": lambda: Squeezes(lambda x: x.amax((2, 3)), 1),
    "linear, relu": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)),
    "a flat map": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(62 * 62 * 4, 4), nn.ReLU(), nn.BatchNorm1d(4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{"to": "in"}, {"to": "gn", "groups": 4}, {"to": "gn", "channels_per_group": 1}])
@pytest.mark.parametrize("name", SQUEEZES)
def test_groups_of_one_value_behind_any_pool_are_refused(name: str, options: dict[str, Any]) -> None:
    net = SQUEEZES[name]()
    assert "each group would be a single value, which erases the data" in str(problems(net.eval(), **options))
    assert len(plan(net, to="gn", groups=2).steps) == 1


def test_timms_pools_are_seen_through() -> None:
    layers = pytest.importorskip("timm.layers")
    net = Squeezes(layers.SelectAdaptivePool2d(1, flatten=True), 1)
    assert "single value" in str(problems(net.eval(), to="in"))


def test_what_may_be_one_value_is_refused_unless_a_run_shows_the_shape() -> None:
    class TwoSizes(Net):
        """Takes no input that anybody guesses."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) if y.dim() == 1 else x.no_such_thing()

    net, y = TwoSizes(), torch.ones(3)
    error = problems(net, to="in")
    assert "each group may be a single value, which erases the data: no run shows how many it holds" in str(error)
    assert "example_inputs" in error.hint
    assert len(plan(net, to="in", example_inputs=(X, y)).steps) == 1
    assert len(plan(net, to="gn", groups=2).steps) == 1


def test_maps_that_a_small_guess_alone_makes_one_position_are_no_reason_to_refuse() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(64), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert len(plan(net, to="in").steps) == 2


def test_the_pooling_branch_of_deeplab_is_refused() -> None:
    segmentation = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    net = segmentation.ASPP(8, [2], out_channels=16)
    error = problems(net, to="in")
    assert [line.split(" ")[0] for line in error.problems] == ["convs.2.2"]
    made = plan(net, to="in", rules={"convs.2": "frozen"})
    assert {step.target for step in made.steps} == {"in", "frozen"}


def test_a_map_that_example_inputs_shrink_to_one_position_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    assert len(plan(net, to="in").steps) == 1  # nothing says how large its maps are
    assert "single value" in str(problems(net, to="in", example_inputs=X))
    assert len(plan(net, to="in", example_inputs=torch.randn(1, 3, 9, 9)).steps) == 1


# --- layers that no per-channel norm can stand for -------------------------------------------------------------------


def test_a_layer_norm_over_tokens_is_refused_and_over_vectors_it_is_not() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    said = "1 (LayerNorm): its channels are the last dimension, the new norm's the second"
    assert said in str(problems(net, to="gn", groups=2, sources=["ln"]))
    assert said in str(problems(net, to="gn", groups=2, sources=["ln"], example_inputs=torch.randn(2, 7, 5)))
    assert said in str(problems(net, to="gn", groups=2, sources=["ln"], example_inputs=torch.randn(2, 4, 5)))
    made = plan(net, to="gn", groups=1, sources=["ln"], example_inputs=torch.randn(2, 5))
    assert [(step.target, step.transfer) for step in made.steps] == [("gn", "exact")]


def test_a_layer_norm_over_several_dimensions_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 8, 8]))
    assert "one weight per element" in str(problems(net, to="gn", sources=["ln"], example_inputs=X))


# --- layers held outside the tree ------------------------------------------------------------------------------------


class Keeps(Net):
    """Calls its BN through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


@pytest.mark.parametrize("options", [{}, {"example_inputs": X}, {"transfer": "copy"}])
def test_a_layer_that_a_plain_list_holds_too_is_an_error_naming_the_holder(options: dict[str, Any]) -> None:
    net = nn.Sequential(Keeps(), nn.ReLU())
    before = fingerprint(net.eval())
    error = problems(net, to="ln", **options)
    assert error.problems == (
        "0.bn (BatchNorm2d): 0.order holds it too, outside the children, where no swap reaches it",
    )
    assert 'rules={"PATH": "keep"}' in error.hint
    with pytest.raises(PlanError):
        normswap.convert(net, to="ln", inplace=True, **options)
    assert fingerprint(net) == before


def test_a_rule_keeps_a_layer_that_a_plain_list_holds_too() -> None:
    net = nn.Sequential(Keeps(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert list(targets_of(plan(net, to="ln", rules={"0": "keep"}))) == ["2"]
