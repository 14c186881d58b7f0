"""Frozen norms do not move, whatever is done to the model around them, and thaw as they were."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import OptionError
from normswap.inspection.inventory import inspect
from normswap.norms.frozen import FrozenBatchNorm
from normswap.norms.renorm import BatchRenorm
from tests.helpers import bits, bn_eval, contents, fingerprint, randomized, relative

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """Norms at several depths: a backbone with two of them, a head with one."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.backbone = nn.ModuleDict({"stem": stem, "layer1": nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))})
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone["stem"](x)
        return self.head(self.backbone["layer1"](x))


NORMS = ("backbone.stem.1", "backbone.layer1.0.0", "head.2")


def detector() -> Any:
    return randomized(Detector()).train()


def train(model: nn.Module, steps: int = 3, **options: Any) -> None:
    """Steps of AdamW with weight decay, in train mode."""
    optimizer = torch.optim.AdamW((p for p in model.parameters()), lr=0.1, weight_decay=0.1)
    model.train()
    for step in range(steps):
        optimizer.zero_grad(**options)
        (model(X + step) ** 2).mean().backward()
        optimizer.step()


def norms_of(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Everything that the norms hold, bit for bit, under the names of the bare model."""
    names = ((n.removeprefix("module.").removeprefix("_orig_mod."), v) for n, v in contents(model).items())
    return {name: value for name, value in names if name.startswith(NORMS)}


# --- what must not move them ----------------------------------------------------------------------------------------


def _plain(model: nn.Module) -> nn.Module:
    return model


def _unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model: nn.Module) -> nn.Module:
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    update_bn([X, X + 1], averaged)
    return averaged.module


COPIES = [_plain, copy.deepcopy, copy.copy, _unpickled, _saved_whole, _averaged]


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__.strip("_"))
def test_training_moves_no_bit_of_a_frozen_norm_in_the_model_or_its_copies(make: Any) -> None:
    model = normswap.freeze(detector())
    before = norms_of(model)
    model = make(model)
    train(model)
    update_bn([X, X + 1], model)
    model.eval()
    model.train()
    model(X)
    assert norms_of(model) == before
    drift = normswap.frozen_drift(model)
    assert (drift.largest, drift.moved, bool(drift), len(drift.layers)) == (0.0, False, False, 3)
    assert set(drift.layers[0].changes) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("make", COPIES, ids=lambda f: f.__name__.strip("_"))
def test_the_same_training_moves_norms_that_are_not_frozen(make: Any) -> None:
    model = make(detector())
    before = norms_of(model)
    train(model)
    assert all(norms_of(model)[name] != value for name, value in before.items())


def test_a_frozen_norm_computes_the_formula_with_its_running_statistics_in_train_mode() -> None:
    model = normswap.freeze(detector())
    bn = model.backbone["stem"][1]
    x = torch.randn(2, 4, 5, 5) * 3 + 1
    assert relative(bn_eval(bn, x), bn(x)) < 1e-6


def test_the_training_flag_stays_false_whoever_sets_it_and_the_rest_follows() -> None:
    model = normswap.freeze(detector())
    model.train()
    bn = model.backbone["stem"][1]
    assert (bn.training, model.training, model.backbone.training) == (False, True, True)
    bn.training = True
    bn.train()
    assert not bn.training


def test_momentum_is_as_it_was_after_update_bn() -> None:
    model = normswap.freeze(detector())
    update_bn([X], model)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {0.1}


def test_activation_checkpointing_does_not_move_a_frozen_norm() -> None:
    model = normswap.freeze(detector())
    before = norms_of(model)
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert norms_of(model) == before


@pytest.mark.parametrize("first", ["freeze", "compile"])
def test_a_compiled_network_keeps_frozen_norms(first: str) -> None:
    model = detector()
    compiled: Any = model
    if first == "compile":
        compiled = torch.compile(model, backend="aot_eager")
        compiled(X)
    normswap.freeze(compiled, modules="backbone")
    if first == "freeze":
        compiled = torch.compile(model, backend="aot_eager")
    before = norms_of(model)
    train(compiled)
    after = norms_of(model)
    assert {n for n in before if before[n] != after[n]} == {n for n in before if n.startswith("head")}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_network_keeps_frozen_norms(one_process: None) -> None:
    model = detector()
    normswap.freeze(model)
    before = norms_of(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped)
    assert norms_of(model) == before
    assert not normswap.frozen_drift(wrapped)


def test_a_functional_call_leaves_frozen_norms_alone() -> None:
    model = normswap.freeze(detector())
    before = norms_of(model)
    out = torch.func.functional_call(model, {n: p * 1 for n, p in model.named_parameters()}, (X,))
    out.sum().backward()
    assert norms_of(model) == before


def test_an_old_gradient_does_not_let_an_optimizer_move_a_frozen_gamma() -> None:
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(X).sum().backward()
    optimizer.step()
    normswap.freeze(model)
    before = norms_of(model)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model(X).sum().backward()
    assert norms_of(model) == before


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        BatchRenorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_with_running_statistics_can_be_frozen(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(norm))
    randomized(model).train()
    normswap.freeze(model)
    before = contents(model[1])
    train(model)
    assert contents(model[1]) == before


class Wide(nn.BatchNorm2d):
    """A BN with a forward of its own, as mixed precision code has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def test_a_subclass_with_a_forward_of_its_own_is_frozen_too() -> None:
    model = normswap.freeze(nn.Sequential(nn.Conv2d(3, 4, 3), Wide(4)))
    before = contents(model[1])
    train(model)
    assert contents(model[1]) == before


def test_timms_fused_layers_are_frozen_and_the_rest_of_them_follows_the_mode() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    layer = timm_layers.BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer=nn.PReLU)
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), layer)).train()
    normswap.freeze(model).train()
    assert (layer.training, layer.drop.training, layer.act.weight.requires_grad) == (False, True, True)
    before = {name: bits(value) for name, value in layer.state_dict().items() if not name.startswith("act")}
    train(model)
    assert {n: bits(v) for n, v in layer.state_dict().items() if not n.startswith("act")} == before


# --- what stays as it was -------------------------------------------------------------------------------------------


def test_freezing_keeps_keys_tensors_class_relations_and_names() -> None:
    model = detector()
    keys, ids, bn = list(model.state_dict()), [id(p) for p in model.parameters()], model.backbone["stem"][1]
    assert normswap.freeze(model) is model
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == ids
    assert model.backbone["stem"][1] is bn
    assert isinstance(bn, nn.BatchNorm2d)
    assert repr(bn).startswith("BatchNorm2d(4, ")
    assert "statistics frozen" in repr(bn)


def test_unfreezing_restores_everything() -> None:
    model = detector()
    model.backbone["stem"][1].weight.requires_grad_(False)
    model.head[2].eval()
    before = fingerprint(model)
    normswap.freeze(model)
    assert normswap.unfreeze(model) is model
    assert fingerprint(model) == before


def test_a_copy_thaws_without_the_original() -> None:
    model = normswap.freeze(detector())
    copied = normswap.unfreeze(copy.deepcopy(model))
    assert type(copied.head[2]) is nn.BatchNorm1d
    train(model)
    assert not normswap.frozen_drift(model)
    with pytest.raises(OptionError, match="nothing of this model is frozen"):
        normswap.frozen_drift(copied)


def test_a_thawed_norm_is_in_the_mode_that_its_parent_was_switched_to() -> None:
    model = normswap.freeze(detector())
    model.eval()
    normswap.unfreeze(model)
    assert not any(m.training for m in model.modules())
    normswap.freeze(model)
    model.train()
    normswap.unfreeze(model)
    assert all(m.training for m in model.modules())


def test_a_network_that_is_one_norm_thaws_in_the_mode_it_was_set_to() -> None:
    bn = normswap.freeze(nn.BatchNorm2d(4).eval())
    bn.train()
    assert not bn.training
    assert normswap.unfreeze(bn).training


def test_a_thawed_norm_trains_again() -> None:
    model = normswap.unfreeze(normswap.freeze(detector()))
    before = norms_of(model)
    train(model)
    assert all(norms_of(model)[name] != value for name, value in before.items())


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


# --- the proof ------------------------------------------------------------------------------------------------------


def test_drift_names_what_was_moved_by_hand_and_by_how_much() -> None:
    model = normswap.freeze(detector())
    model.head[2].weight.data[1] += 0.5
    model.head[2].num_batches_tracked += 3
    model.backbone["stem"][1].running_var[0] = float("nan")
    model.head[2].bias.requires_grad_(True)
    drift = normswap.frozen_drift(model)
    changes = {(layer.path, name): c for layer in drift.layers for name, c in layer.changes.items() if c}
    assert changes == {
        ("head.2", "weight"): pytest.approx(0.5),
        ("head.2", "num_batches_tracked"): 3.0,
        ("backbone.stem.1", "running_var"): float("inf"),
    }
    assert drift.moved
    assert "head.2.weight: moved by up to 0.5" in str(drift)
    assert "head.2.bias: requires a gradient again" in str(drift)
    assert json.loads(json.dumps(drift.to_dict()))["moved"] is True


def test_a_nan_that_was_there_before_did_not_move() -> None:
    model = detector()
    model.head[2].running_var[0] = float("nan")
    normswap.freeze(model)
    assert not normswap.frozen_drift(model)


def test_a_change_of_dtype_is_no_drift() -> None:
    assert not normswap.frozen_drift(normswap.freeze(detector()).half())


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
