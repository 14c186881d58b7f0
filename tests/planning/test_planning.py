"""Plans: groups, options, rules, which layers are converted and how each is carried over."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Residual, conv_bn, fingerprint, randomized
from planned import Widths, problems, targets_of
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from normswap.planning.planner import plan

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
