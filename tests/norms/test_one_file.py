"""A norm is one file: what is particular to it stands there, and nowhere else in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import bn_eval, conv_bn, relative, run
from torch import nn

import normswap
from normswap.errors import OptionError
from normswap.norms import registry
from normswap.norms._building import read_statistics_norm
from normswap.norms.batch import build_with_statistics
from normswap.norms.registry import specs
from normswap.norms.spec import NormSpec

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "normswap"

# Where else a norm may be named, and why.
NAMED = {
    ("display/overview.py", "fused"): "how the statistics were carried over, not the norm",
    ("advice/advise.py", "frozen"): "advice",
    **{("advice/rules.py", name): "advice" for name in ("bn", "frozen", "fused", "gn", "in", "ln", "ln-channel")},
    ("cli/commands/demo.py", "bn"): "the demo's story is of these two",
    ("cli/commands/demo.py", "gn"): "the demo's story is of these two",
    ("cli/commands/compare.py", "bn"): "the baseline, which is always there",
    ("demo/picture.py", "bn"): "the demo's story is of these two",
    ("demo/picture.py", "gn"): "the demo's story is of these two",
    ("demo/story.py", "bn"): "the demo's story is of these two",
    ("demo/story.py", "gn"): "the demo's story is of these two",
    ("detection/detectors.py", "gn"): "the default of an option",
    ("detection/parts.py", "gn"): "advice",
    **{("pages/model_card.py", name): "the hub's word for it" for name in ("frozen", "gn", "in", "ln")},
    **{("sweep/compare.py", name): "the defaults of an option" for name in ("bn", "frozen", "gn")},
    ("inspection/inventory.py", "frozen"): "the mode of any layer in which nothing moves",
    ("planning/planner.py", "frozen"): "advice",
    ("tracing/code_paths.py", "in"): "Python's operator",
}
CLASSES_NAMED = {
    "modules/fast_path.py": "what torch's own operation takes for granted",
    "demo/network.py": "the demo's network",
}


def elsewhere() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith("norms/"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                yield place, node


def test_no_norm_is_named_outside_of_its_file_but_where_a_reason_is_given() -> None:
    names = {spec.name for spec in specs()}
    found = {
        (place, node.value)
        for place, node in elsewhere()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert found == set(NAMED)


def test_no_norm_s_class_is_named_outside_of_its_file_but_where_a_reason_is_given() -> None:
    classes = {cls.__name__ for spec in specs() for cls in spec.classes} | {"_NormBase", "_BatchNorm"}
    found = {
        place
        for place, node in elsewhere()
        if (isinstance(node, ast.Name) and node.id in classes)
        or (isinstance(node, ast.Attribute) and node.attr in classes)
    }
    assert found == set(CLASSES_NAMED)


# --- a norm of one's own has all that the others have -----------------------------------------------------------------


class Doubled(nn.modules.batchnorm._BatchNorm):
    """Batch norm with twice the output: nothing that the package could take for one of its own."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.factor = 2.0
        self.register_buffer("seen", torch.zeros(1))

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x) * self.factor / 2


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> NormSpec:
    for table in ("_BY_NAME", "_BY_CLASS", "_BY_CLASS_NAME"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    registry._of_class.cache_clear()
    yield registry.register(
        NormSpec(
            name="mine",
            title="Doubled",
            formula="-",
            axes="-",
            source="-",
            read=lambda module: read_statistics_norm(module, dims=None),
            build=lambda state, options: build_with_statistics(Doubled, state, options),
            aliases=("doublednorm",),
            classes=(Doubled,),
            attributes=("num_features", "momentum", "track_running_stats", "factor"),
            tensors=("seen",),
            statistics="batch",
            small_batch="process",
        )
    )
    registry._of_class.cache_clear()


def test_it_is_exact_to_and_from_every_norm_that_is_a_fixed_map(doubled: NormSpec) -> None:
    for name in ("bn", "sync", "frozen", "renorm", "mine"):
        assert "mine" in registry.exact_from(registry.norm_named(name))
    net, x = conv_bn(), torch.randn(2, 3, 5, 5)
    expected = bn_eval(net[1], net[0](x)).relu()
    mine = normswap.convert(net, to="mine")
    assert type(mine[1]) is Doubled
    assert relative(expected.flatten(), run(mine, x)) < 1e-6
    assert relative(expected.flatten(), run(normswap.convert(mine, to="frozen"), x)) < 1e-5


def test_it_is_converted_by_default_and_leaves_nothing_of_its_own_behind(doubled: NormSpec) -> None:
    mine = normswap.convert(conv_bn(), to="mine")
    mine[1].note = "a user's"
    gn = normswap.convert(mine, to="gn", groups=2)
    assert type(gn[1]) is nn.GroupNorm
    assert gn[1].note == "a user's"
    assert not hasattr(gn[1], "factor")
    assert list(gn[1].state_dict()) == ["weight", "bias"]


def test_its_statistics_are_estimated_where_there_are_none(doubled: NormSpec) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)).eval(), torch.randn(6, 3, 4, 4)
    made = normswap.plan(net, to="mine", sources=["gn"], missing_statistics="later")
    mine = normswap.convert(net, using=made)
    normswap.estimate_statistics(mine, x)
    torch.testing.assert_close(mine[1].running_mean, net[0](x).mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_frozen_one_stays_so_through_a_conversion_and_one_without_statistics_is_refused(doubled: NormSpec) -> None:
    frozen = normswap.freeze(conv_bn())
    mine = normswap.convert(frozen, to="mine").train()
    assert not mine[1].training
    with pytest.raises(OptionError, match="1 batch norm layer without running statistics to freeze: 1"):
        normswap.freeze(nn.Sequential(nn.Conv2d(3, 8, 1), Doubled(8, track_running_stats=False)))


def test_small_batches_are_told_of(doubled: NormSpec) -> None:
    from normswap.finetuning.finetune import small_batch_note

    assert str(small_batch_note(normswap.convert(conv_bn(), to="mine"), 2)).startswith("1 BatchNorm layer will see")


def test_what_people_call_it_is_understood_where_norms_are_named(doubled: NormSpec) -> None:
    with pytest.raises(OptionError) as error:
        normswap.plan(conv_bn(), to="gn", sources=["Doubled-Norm"])
    assert error.value.hint == "Did you mean mine?"


def test_what_a_user_registered_under_the_name_of_another_norm_s_tensor_stays() -> None:
    net = conv_bn()
    net[1].register_buffer("scale", torch.full((3,), 5.0))
    net[1].r_max = 7
    gn = normswap.convert(net, to="gn", groups=2)
    assert torch.equal(gn[1].scale, torch.full((3,), 5.0))
    assert gn[1].r_max == 7


def test_norms_are_listed_in_the_order_of_their_files() -> None:
    files = [spec.read.__module__.rpartition(".")[2] for spec in specs()]
    assert files == sorted(files)
    assert {spec.name: spec.read.__module__ for spec in specs()}["gn"] == "normswap.norms.group"
