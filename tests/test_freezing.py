"""Frozen norms do not move, whatever is done to the model around them, and thaw as they were."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import OptionError
from normswap.norms.renorm import BatchRenorm
from tests.freezable import X, detector, norms_of, train
from tests.helpers import bits, bn_eval, contents, fingerprint, randomized, relative

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


@pytest.mark.parametrize("model", ["resnet50", None, [1]])
def test_the_drift_of_what_is_no_network_is_an_option_error(model: object) -> None:
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module"):
        normswap.frozen_drift(model)
