"""Plans: what becomes of each layer, and every way in which it cannot."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Net, Residual, X, conv_bn, fingerprint, randomized
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import CheckpointError, OptionError, PlanError
from normswap.norms.spec import Options
from normswap.planning.plan import Plan, Step, Transfer, describe
from normswap.planning.planner import plan
from normswap.planning.rules import Rule


class Widths(nn.Module):
    """BNs of 6, 48 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)))
        self.body = nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 48, 3), bn=nn.BatchNorm2d(48), act=nn.ReLU()))
        self.tail = nn.Sequential(OrderedDict(conv=nn.Conv2d(48, 64, 3), bn=nn.BatchNorm2d(64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.stem(x)))


def targets_of(made: Plan) -> dict[str, str]:
    return {step.path: describe(step) for step in made.steps}


def problems(*args: Any, **kwargs: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(*args, **kwargs)
    return caught.value


# --- groups -----------------------------------------------------------------------------------------------------


def test_every_layer_that_does_not_divide_is_listed_with_its_channels_and_the_allowed_numbers() -> None:
    error = problems(Widths(), to="gn", groups=32)
    assert error.problems == (
        "stem.bn (BatchNorm2d): 6 channels are fewer than 32 groups; allowed groups: 1, 2, 3, 6",
        "body.bn (BatchNorm2d): 48 channels do not divide into 32 groups; "
        "allowed groups: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
    )
    assert str(error).startswith("2 layers cannot be converted as asked:\n  stem.bn")
    assert error.indivisible
    assert 'indivisible="nearest"' in error.hint
    assert 'groups="auto" fits every layer' in error.hint


def test_the_hint_names_a_group_size_that_fits_every_layer() -> None:
    net = nn.Sequential(conv_bn(48)[0], nn.BatchNorm2d(48), nn.Conv2d(48, 64, 1), nn.BatchNorm2d(64))
    error = problems(net, to="gn", groups=32)
    assert "channels_per_group=16 fits every layer" in error.hint
    assert targets_of(plan(net, to="gn", channels_per_group=16)) == {"1": "gn(num_groups=3)", "3": "gn(num_groups=4)"}


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        ({"groups": 32, "indivisible": "nearest"}, [6, 24, 32]),
        ({"channels_per_group": 16, "indivisible": "nearest"}, [1, 3, 4]),
        ({"channels_per_group": 2}, [3, 24, 32]),
        ({"groups": 2}, [2, 2, 2]),
        ({"groups": "auto"}, [1, 3, 4]),
        ({}, [1, 3, 4]),
    ],
)
def test_groups_are_chosen_for_each_layer(asked: dict[str, Any], groups: list[int]) -> None:
    assert [step.options.num_groups for step in plan(Widths(), to="gn", **asked).steps] == groups


# --- options that make no sense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to convert to: give `to` or `rules`; norms: bn, sync"),
        ({"to": "groupnorm"}, "unknown norm 'groupnorm'; known: bn, sync"),
        ({"to": "gn", "groups": 2, "channels_per_group": 2}, "groups and channels_per_group exclude each other"),
        ({"to": "gn", "groups": 0}, "groups must be a positive integer or auto, got 0"),
        ({"to": "gn", "groups": -4}, "groups must be a positive integer or auto, got -4"),
        ({"to": "gn", "groups": True}, "groups must be a positive integer or auto, got True"),
        ({"to": "gn", "groups": 2.0}, r"groups must be a positive integer or auto, got 2\.0"),
        ({"to": "gn", "groups": "many"}, "groups must be a positive integer or auto, got 'many'"),
        ({"to": "gn", "channels_per_group": 0}, "channels_per_group must be a positive integer, got 0"),
        ({"to": "gn", "indivisible": "up"}, "indivisible must be 'error' or 'nearest', got 'up'"),
        ({"to": "gn", "transfer": "move"}, "transfer must be one of fold, copy, reset, got 'move'"),
        ({"to": "gn", "eps": -1.0}, r"eps must be a finite number >= 0, got -1\.0"),
        ({"to": "gn", "eps": float("nan")}, "eps must be a finite number >= 0, got nan"),
        ({"to": "gn", "eps": float("inf")}, "eps must be a finite number >= 0, got inf"),
        ({"to": "gn", "eps": "1"}, "eps must be a finite number >= 0, got '1'"),
        ({"to": "ln", "groups": 2}, "groups apply to gn only, not to ln"),
        ({"to": "fused", "transfer": "copy"}, 'fused carries everything over; transfer="copy"'),
        ({"to": "frozen", "transfer": "reset"}, 'frozen is made of the running statistics; transfer="reset"'),
        ({"to": "ln", "sources": ["batch"]}, "unknown norm 'batch' in sources"),
        ({"to": "ln", "missing_statistics": "no"}, "missing_statistics must be 'error' or 'later', got 'no'"),
        ({"rules": {"": "gn"}}, "a rule needs a pattern"),
        ({"rules": {"*": "gm"}}, "unknown norm 'gm'"),
        ({"rules": ["gn"]}, "rules must be pattern -> norm"),
        ({"rules": {"head": "gn"}}, "rule matches no layer to convert: 'head'"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_clear_error(options: dict[str, Any], said: str) -> None:
    net = Widths().train()
    before = fingerprint(net)
    for verb in (plan, normswap.convert):
        with pytest.raises(OptionError, match=said):
            verb(net, **options)
    assert fingerprint(net) == before


def test_an_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean frozen"):
        plan(Widths(), to="freeze")


@pytest.mark.parametrize("net", [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ReLU()])
def test_a_network_without_norms_is_an_error(net: nn.Module) -> None:
    assert str(problems(net, to="gn")) == f"{type(net).__name__} has no norm layer"


# --- rules ------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins() -> None:
    made = plan(Widths(), rules={"body.*": "ln", "*.bn": "in", "tail": "gn"})
    assert targets_of(made) == {"stem.bn": "in", "body.bn": "ln", "tail.bn": "in"}


def test_what_no_rule_matches_goes_to_the_target_and_without_one_is_kept() -> None:
    made = plan(Widths(), to="ln", rules=[("tail", "frozen")])
    assert targets_of(made) == {"stem.bn": "ln", "body.bn": "ln", "tail.bn": "frozen"}
    made = plan(Widths(), rules=[("tail", "frozen")])
    assert targets_of(made) == {"tail.bn": "frozen"}
    assert [(kept.path, kept.reason) for kept in made.kept] == [("stem.bn", "no rule"), ("body.bn", "no rule")]


def test_keep_leaves_a_layer_whatever_is_wrong_with_it() -> None:
    made = plan(Widths(), to="gn", groups=16, rules={"stem": "keep"})
    assert targets_of(made) == {"body.bn": "gn(num_groups=16)", "tail.bn": "gn(num_groups=16)"}
    assert [(kept.path, kept.norm, kept.reason) for kept in made.kept] == [("stem.bn", "bn", "rule")]


def test_a_rule_reaches_a_shared_layer_by_any_of_its_names() -> None:
    net = Widths()
    net.body.extra = net.stem.bn
    assert targets_of(plan(net, to="ln", rules={"body.extra": "frozen"}))["stem.bn"] == "frozen"


def test_a_rule_that_matches_nothing_is_an_error_and_one_that_comes_too_late_is_not() -> None:
    with pytest.raises(OptionError, match=r"rule matches no layer to convert: 'haed', 'x\.\*'"):
        plan(Widths(), to="ln", rules={"haed": "in", "x.*": "gn", "stem": "in"})
    assert plan(Widths(), to="ln", rules={"*": "in", "stem": "ln"}).steps[0].target == "in"


def test_a_rule_keeps_a_suspect_and_without_one_every_suspect_is_listed() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(4), nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    error = problems(net, to="gn", groups=3)
    assert [line.split(":")[0] for line in error.problems] == ["2 (BatchNorm2d)", "1 (Odd)", "3 (LazyBatchNorm2d)"]
    assert 'rules={"PATH": "keep"}' in error.hint
    made = plan(net, to="gn", groups=2, rules={"1": "keep", "3": "keep"})
    assert targets_of(made) == {"2": "gn(num_groups=2)"}
    assert {(kept.path, kept.reason) for kept in made.kept} == {("1", "rule"), ("3", "rule")}


# --- which layers -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.gn, self.inorm, self.frozen = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), randomized_frozen()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.inorm(self.gn(self.bn(self.conv(x)).relu()).relu()).relu())


def randomized_frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return randomized(FrozenBatchNorm2d(4))


def test_by_default_only_norms_with_batch_statistics_are_converted() -> None:
    made = plan(Mixed(), to="ln")
    assert list(targets_of(made)) == ["bn", "frozen"]
    assert {(kept.path, kept.reason) for kept in made.kept} == {
        ("gn", "not among the norms to convert"), ("inorm", "not among the norms to convert"),
    }  # fmt: skip


def test_sources_choose_other_norms() -> None:
    assert list(targets_of(plan(Mixed(), to="ln", sources=["gn", "in"]))) == ["gn", "inorm"]
    with pytest.raises(OptionError, match="rule matches no layer to convert: 'gn'"):
        plan(Mixed(), rules={"gn": "ln", "bn": "ln"})


def test_in_a_network_without_batch_norms_the_other_channel_norms_are_converted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 5), nn.LayerNorm(5))
    assert list(targets_of(plan(net, to="ln"))) == ["1"]


# --- how each is carried over -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "transfer"),
    [
        ({"to": "gn"}, "fold"),
        ({"to": "ln-channel"}, "fold"),
        ({"to": "gn", "transfer": "copy"}, "copy"),
        ({"to": "gn", "transfer": "reset"}, "reset"),
        ({"to": "fused"}, "fuse"),
        ({"to": "frozen"}, "exact"),
        ({"to": "sync", "transfer": "copy"}, "exact"),
        ({"to": "bn", "transfer": "reset"}, "reset"),
    ],
)
def test_a_norm_fed_by_one_layer_is_carried_over_by(options: dict[str, str], transfer: str) -> None:
    (step,) = plan(conv_bn(16), **options).steps
    assert step.transfer == transfer
    assert step.producers == (("0",) if transfer in ("fold", "fuse") else ())


def test_where_no_layer_feeds_the_norm_alone_it_is_prescaled_and_the_reason_noted() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
    (step,) = plan(net, to="ln").steps
    assert (step.transfer, step.producers, step.note) == ("prescale", (), "its input is not the output of one layer")
    (step,) = plan(net, to="fused").steps
    assert step.transfer == "affine"


def test_a_norm_without_running_statistics_carries_gamma_and_beta_over() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    (step,) = plan(net, to="gn", groups=2).steps
    assert (step.transfer, step.note) == ("copy", "no running statistics to carry over")


def test_zero_init_goes_to_the_last_norm_of_each_residual_branch() -> None:
    net = nn.Sequential(Residual(), Residual())
    made = plan(net, to="ln", zero_init_residual=True)
    assert [step.path for step in made.steps if step.zero_init] == ["0.bn2", "1.bn2"]
    assert not any(step.zero_init for step in plan(net, to="ln").steps)


def test_group_norms_keep_their_eps_and_batch_norms_targets_take_their_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4, eps=0.25))
    assert plan(net, to="ln").steps[0].options.eps == 0.25
    assert plan(net, to="ln", eps=0.5).steps[0].options.eps == 0.5
    assert plan(conv_bn(4, eps=0.25), to="ln").steps[0].options.eps is None


def test_a_group_norm_with_another_eps_computes_something_else_and_is_not_called_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))
    steps = [plan(net, to="gn", groups=2, eps=eps).steps[0] for eps in (None, 1e-5, 0.5)]
    assert [step.transfer for step in steps] == ["exact", "exact", "copy"]
    assert steps[2].note == "another eps than it had"
    assert normswap.convert(net.eval(), to="gn", groups=2, eps=0.5)[1].eps == 0.5


@pytest.mark.parametrize(
    ("net", "options", "eps"),
    [
        (conv_bn(4), {}, 1.0),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), {}, 1.0),
        (conv_bn(4), {"transfer": "copy"}, None),
        (conv_bn(4, eps=0.25), {"to": "sync"}, None),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4, eps=0.25)), {}, 0.25),
    ],
)
def test_auto_eps_is_1_where_the_input_of_a_per_sample_norm_is_standardised(
    net: nn.Module, options: dict[str, str], eps: float | None
) -> None:
    assert plan(net, **{"to": "ln", **options}, eps="auto").steps[0].options.eps == eps


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


def test_calibration_later_is_allowed_where_the_norm_can_wait_for_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    (step,) = plan(net, to="bn", missing_statistics="later").steps
    assert (step.target, step.transfer, step.dims) == ("bn", "copy", 2)
    problems(net, to="frozen", missing_statistics="later")


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


# --- plans are data -------------------------------------------------------------------------------------------------


def test_planning_changes_nothing() -> None:
    net = Widths().train()
    before = fingerprint(net)
    plan(net, to="ln", eps=1.0, zero_init_residual=True)
    plan(net, to="ln", example_inputs=torch.randn(1, 3, 16, 16))
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gn", "groups": 2, "eps": 1.0},
        {"to": "renorm"},
        {"to": "fused"},
        {"to": "ln", "rules": {"stem": "keep", "tail": "frozen"}},
    ],
)
def test_a_plan_survives_json(options: dict[str, Any]) -> None:
    made = plan(Widths(), **options)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert [type(step.options) for step in again.steps] == [type(step.options) for step in made.steps]
    json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "{}", '"x"', "3",
        '{"steps": [{}], "kept": [], "transfer": "fold", "meta": {}}',
        '{"steps": 3, "kept": [], "transfer": "fold", "meta": {}}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_one_clear_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "nothing"),
        ("options", {"eps": -1.0}),
        ("options", {"num_groups": 0}),
        ("options", {"x": 1}),
        ("new", 1),
    ],
)
def test_an_edited_plan_is_one_clear_error(key: str, value: Any) -> None:
    values = plan(conv_bn(4), to="gn").to_dict()
    values["steps"][0][key] = value
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_dict(values)


def test_a_plan_reads_as_a_table_of_what_changes_and_one_of_what_stays() -> None:
    made = plan(Widths(), to="gn", groups=2, rules={"tail": "keep"})
    rows = [line.split() for line in str(made).splitlines()]
    assert rows[1] == ["stem.bn", "1", "6", "BatchNorm2d", "gn", "(2", "groups)", "folded"]
    assert rows[-1] == ["tail.bn", "1", "bn", "rule"]


def test_rules_and_steps_are_values() -> None:
    assert Rule("a", "gn") == Rule("a", "gn")
    step = Step("a", (), "bn", "BatchNorm2d", 4, "ln", Options(), "copy")
    with pytest.raises(AttributeError):
        step.path = "b"


def test_a_transfer_is_its_text_in_json_and_in_comparisons() -> None:
    made = plan(conv_bn(4), "gn", groups=2)
    (step,) = made.to_dict()["steps"]
    assert (type(step["transfer"]), step["transfer"]) == (str, "fold")
    assert (str(made.steps[0].transfer), f"{made.steps[0].transfer}") == ("fold", "fold")
    assert Plan.from_json(made.to_json()).steps[0].transfer is Transfer.FOLD
    assert {Transfer.FOLD: 1}["fold"] == 1


@pytest.mark.parametrize(
    ("transfer", "edits", "standardizes", "keeps_outputs"),
    [
        ("fold", True, True, True),
        ("prescale", False, True, True),
        ("fuse", True, False, True),
        ("affine", False, False, True),
        ("exact", False, False, True),
        ("copy", False, False, False),
        ("reset", False, False, False),
    ],
)
def test_a_transfer_says_what_it_does(transfer: str, edits: bool, standardizes: bool, keeps_outputs: bool) -> None:
    found = Transfer(transfer)
    assert (found.edits_producer, found.standardizes, found.keeps_outputs) == (edits, standardizes, keeps_outputs)
    assert found.needs_statistics == (keeps_outputs and transfer != "exact")


def test_a_plan_with_an_unknown_transfer_is_none() -> None:
    values = plan(conv_bn(4), "gn", groups=2).to_dict()
    values["steps"][0]["transfer"] = "move"
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_dict(values)
