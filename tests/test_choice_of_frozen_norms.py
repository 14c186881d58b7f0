"""Which layers and which parts of them are frozen, and how frozen networks go with the rest of normswap."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import normswap
from normswap.errors import OptionError
from normswap.inspection.inventory import inspect
from normswap.norms.frozen import FrozenBatchNorm
from tests.freezable import NORMS, X, detector, norms_of, train
from tests.helpers import contents, fingerprint, randomized

# --- which layers, which part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, NORMS),
        ("backbone.*", NORMS[:2]),
        ("backbone", NORMS[:2]),
        (["backbone.stem.*", "head.2"], (NORMS[0], NORMS[2])),
        ("*.0.0", NORMS[1:2]),
    ],
)
def test_patterns_choose_layers_at_every_depth(modules: Any, expected: tuple[str, ...]) -> None:
    drift = normswap.frozen_drift(normswap.freeze(detector(), modules=modules))
    assert tuple(layer.path for layer in drift.layers) == expected


def test_patterns_see_through_wrappers() -> None:
    model = AveragedModel(detector())
    drift = normswap.frozen_drift(normswap.freeze(model, modules="backbone.*"))
    assert [layer.path for layer in drift.layers] == [f"module.{path}" for path in NORMS[:2]]


def test_a_pattern_that_matches_no_norm_names_near_ones_and_changes_nothing() -> None:
    model = detector()
    before = fingerprint(model)
    with pytest.raises(OptionError, match=r"no norm layer matches 'bakbone\.\*'\nNear names: .*backbone"):
        normswap.freeze(model, modules=["head.*", "bakbone.*"])
    assert fingerprint(model) == before
    with pytest.raises(OptionError, match="no norm layer matches 'head"):
        normswap.unfreeze(model, modules="head.1")


def test_statistics_alone_leave_gamma_and_beta_to_train() -> None:
    model = normswap.freeze(detector(), affine=False)
    before = norms_of(model)
    train(model)
    after = norms_of(model)
    assert {n for n in before if before[n] == after[n]} == {n for n in before if n.endswith(("mean", "var", "tracked"))}
    assert not normswap.frozen_drift(model)


def test_affine_alone_leaves_statistics_to_move() -> None:
    model = normswap.freeze(detector(), stats=False)
    before = norms_of(model)
    train(model)
    after = norms_of(model)
    assert {n for n in before if before[n] == after[n]} == {n for n in before if n.endswith(("weight", "bias"))}
    assert model.head[2].training


def test_freezing_again_adds_parts_and_keeps_what_thawing_restores() -> None:
    model = detector()
    before = fingerprint(model)
    normswap.freeze(model, affine=False)
    normswap.freeze(model, modules="backbone")
    normswap.freeze(model, modules="head", stats=False)
    normswap.freeze(model)
    train(model)
    assert not normswap.frozen_drift(model)
    normswap.unfreeze(model, affine=False)
    assert model.head[2].training
    assert not model.head[2].weight.requires_grad
    normswap.unfreeze(model)
    assert {k: v for k, v in fingerprint(model).items() if k[1] in ("module", "attributes")} == {
        k: v for k, v in before.items() if k[1] in ("module", "attributes")
    }
    assert all(p.requires_grad for p in model.parameters())


def test_layers_thaw_one_after_another() -> None:
    model = normswap.freeze(detector())
    for left, pattern in ((2, "head"), (1, "backbone.layer1.*")):
        normswap.unfreeze(model, pattern)
        train(model)
        drift = normswap.frozen_drift(model)
        assert (len(drift.layers), drift.moved) == (left, False)


def test_a_gamma_that_two_norms_share_is_frozen_as_long_as_either_is() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    normswap.freeze(model, modules="0")
    normswap.freeze(model, modules="1")
    normswap.unfreeze(model, modules="0")
    assert not model[0].weight.requires_grad
    normswap.unfreeze(model, modules="1")
    assert model[0].weight.requires_grad


def test_norms_of_no_running_statistics_are_frozen_in_what_they_have() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    normswap.freeze(model)
    train(model)
    assert [len(layer.changes) for layer in normswap.frozen_drift(model).layers] == [2, 5]
    with pytest.raises(OptionError, match="none of the 1 norm layers has running statistics"):
        normswap.freeze(nn.Sequential(nn.GroupNorm(2, 4)), affine=False)


def test_batch_norms_that_track_nothing_are_listed_unless_affine_alone_is_asked_for() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(3, track_running_stats=t) for t in (True, False, False)))
    with pytest.raises(OptionError, match="2 batch norm layers without running statistics to freeze: 1, 2"):
        normswap.freeze(model)
    assert model[0].training
    normswap.freeze(model, stats=False)
    normswap.freeze(model, modules="0")


def test_the_way_out_that_the_error_names_works() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    converted = normswap.convert(model, to="bn", missing_statistics="later", check=False)
    normswap.calibrate(converted, reference=model, data=X)
    normswap.freeze(converted)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyBatchNorm2d()), "0 is lazy: run the model once first"),
        (nn.Sequential(nn.BatchNorm2d(3, device="meta")), "0 is on the meta device"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential has no norm layer to freeze"),
    ],
)
def test_what_cannot_be_frozen_is_said(model: nn.Module, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        normswap.freeze(model)


def test_freezing_nothing_and_bad_arguments_are_errors() -> None:
    with pytest.raises(OptionError, match="freezes nothing"):
        normswap.freeze(detector(), stats=False, affine=False)
    with pytest.raises(OptionError, match="modules must be a pattern"):
        normswap.freeze(detector(), modules=[])


# --- with the rest of normswap --------------------------------------------------------------------------------------


def _chain() -> Any:
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).train()


def test_a_frozen_network_is_known_planned_and_converted_as_before() -> None:
    plain = _chain()
    frozen = normswap.freeze(copy.deepcopy(plain))
    assert normswap.plan(plain, to="gn", groups=2) == normswap.plan(frozen, to="gn", groups=2)
    assert [layer.mode for layer in inspect(frozen).layers] == ["frozen"]
    a, b = (normswap.convert(m, to="gn", groups=2) for m in (plain, frozen))
    assert contents(a) == contents(b)
    assert type(b[1]) is nn.GroupNorm
    assert not b[1].weight.requires_grad
    normswap.unfreeze(b)
    assert b[1].weight.requires_grad
    assert fingerprint(b)["1", "attributes"][0][0] != "_normswap_frozen"


@pytest.mark.parametrize("to", ["bn", "sync", "renorm"])
def test_statistics_stay_frozen_in_a_norm_that_keeps_them(to: str) -> None:
    converted = normswap.convert(normswap.freeze(_chain()), to=to)
    before = contents(converted[1])
    converted.train()(X)
    assert contents(converted[1]) == before
    assert not normswap.frozen_drift(converted)
    normswap.unfreeze(converted).train()(X)
    assert contents(converted[1]) != before


def test_frozen_norms_become_fixed_ones() -> None:
    converted = normswap.convert(normswap.freeze(_chain()), to="frozen")
    assert isinstance(converted[1], FrozenBatchNorm)


def test_a_reverted_network_is_frozen_as_it_was() -> None:
    model = normswap.freeze(_chain())
    before = fingerprint(model)
    root = normswap.revert(normswap.convert(model, to="gn", groups=2, inplace=True))
    assert {k: v for k, v in fingerprint(root).items() if k[1] in ("module", "weight", "running_mean")} == {
        k: v for k, v in before.items() if k[1] in ("module", "weight", "running_mean")
    }
    assert not normswap.frozen_drift(root.train())


def test_a_file_of_a_frozen_network_loads(tmp_path: Path) -> None:
    converted = normswap.convert(normswap.freeze(_chain()), to="sync")
    normswap.save(converted, tmp_path / "a.safetensors")
    loaded = normswap.load(tmp_path / "a.safetensors", model=_chain())
    assert contents(loaded) == contents(converted)


def test_a_parametrized_norm_freezes_and_thaws() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model = _chain()
    parametrize.register_parametrization(model[1], "weight", Double())
    normswap.freeze(model)
    before = contents(model[1])
    train(model)
    assert contents(model[1]) == before
    assert inspect(model).layers[0].class_name == "BatchNorm2d"
    normswap.unfreeze(model)
    train(model)
    assert all(value != before[name] for name, value in contents(model[1]).items())
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.BatchNorm2d


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "freezing.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, names)
    assert capsys.readouterr().out.strip() in page
