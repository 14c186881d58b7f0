"""Networks whose classes do what torch's own do not: each of these once ended in a traceback."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Net, X, contents, randomized
from torch import Tensor, nn

import normswap
from normswap.errors import NormswapError, OptionError, PlanError
from normswap.norms.registry import targets


class TrainsInSilence(Net):
    """`train`, and so `eval`, returns nothing, as the backbones of OpenMMLab do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_network_whose_train_returns_nothing_is_loaded(tmp_path: Path) -> None:
    net = randomized(Net())
    silent = TrainsInSilence()
    silent.load_state_dict(net.state_dict())
    silent.eval()
    new = normswap.convert(silent, to="gn")
    back = normswap.load(normswap.save(new, tmp_path / "net.safetensors"), TrainsInSilence())
    assert torch.equal(back(X), new(X))
    assert contents(normswap.revert(back)) == contents(silent)


@pytest.mark.parametrize("to", sorted({*targets()} - {"rms"}))  # which has no place for a bias
def test_channel_counts_of_numpy_are_numbers_like_others(to: str, tmp_path: Path) -> None:
    def made() -> nn.Module:
        return randomized(
            nn.Sequential(nn.Conv2d(3, np.int64(8), 3), nn.BatchNorm2d(np.int64(8), eps=np.float32(1e-3)))
        )

    new = normswap.convert(made(), to=to)
    assert torch.equal(normswap.load(normswap.save(new, tmp_path / "net.safetensors"), made())(X), new(X))


@pytest.mark.parametrize("asked", [{"groups": np.int64(4)}, {"channels_per_group": np.int32(1)}])
def test_groups_may_be_numbers_of_numpy(asked: dict[str, int]) -> None:
    new = normswap.convert(randomized(Net()), to="gn", **asked)
    assert new.bn.num_groups == 4
    assert normswap.Plan.from_json(new._normswap.plan.to_json()) == new._normswap.plan


class KeepsModules(Net):
    """A list under the name of a method of every module."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = ["conv", "bn"]  # type: ignore[assignment]


def test_a_network_that_keeps_a_list_called_modules_is_converted_and_reverted(tmp_path: Path) -> None:
    net = randomized_by_children(KeepsModules())
    new = normswap.convert(net, to="gn")
    assert isinstance(new.bn, nn.GroupNorm)
    back = normswap.load(normswap.save(new, tmp_path / "net.safetensors"), copy.deepcopy(net))
    assert contents(normswap.revert(back)) == contents(net)


def randomized_by_children(net: Net) -> Net:
    for child in net.children():
        randomized(child)
    return net.eval()


def test_no_code_asks_a_network_for_its_modules_under_a_name_that_it_may_have_taken() -> None:
    package = Path(normswap.__file__).parent
    asked = [p.name for p in package.rglob("*.py") if "model.modules()" in p.read_text()]
    assert asked == []


# --- scripted, traced, prepared for quantization ----------------------------------------------------------------


def traced(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, X)


def scripted(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


@pytest.mark.parametrize("made", [traced, scripted])
def test_a_compiled_network_is_refused_with_the_layer_and_the_way_out(made: object) -> None:
    net = made(randomized(Net()))
    assert [(s.path, s.reason) for s in normswap.inspect(net).suspects] == [
        ("bn", "a scripted module cannot be changed: convert the original, then script it")
    ]
    with pytest.raises(PlanError, match=r"bn .*convert the original"):
        normswap.convert(net, to="gn")


@pytest.mark.parametrize("made", [traced, scripted])
def test_a_network_with_a_compiled_part_is_converted_around_it(made: object) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.conv, self.bn = made(randomized(Net())), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.part(x)))

    net = Around().eval()
    randomized(net.bn)
    new = normswap.convert(net, rules={"part.*": "keep", "*": "gn"}, example_inputs=X)
    assert isinstance(new.bn, nn.GroupNorm)
    assert new._normswap.check.passed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_network_prepared_for_quantization_is_loaded_into_one_that_has_seen_nothing_yet(tmp_path: Path) -> None:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    def prepared() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
        net.qconfig = get_default_qat_qconfig("fbgemm")
        return prepare_qat(net)

    net = prepared()
    net(X)
    # Values are rounded to 8 bits on the way, which rounding errors tip over: there is nothing to prove.
    new = normswap.convert(net.eval(), to="gn", check=False)
    back = normswap.load(normswap.save(new, tmp_path / "net.safetensors"), prepared())
    assert contents(back) == contents(new)
    assert contents(normswap.revert(back)) == contents(net)


# --- what holds a network ---------------------------------------------------------------------------------------


class NotToBeCopied(nn.Module):
    """Holds a network and an open file, say."""

    def __init__(self) -> None:
        super().__init__()
        self.net = randomized(Net())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot pickle '_io.TextIOWrapper' object")


def test_of_a_wrapper_that_cannot_be_copied_the_network_within_is_named() -> None:
    holder = NotToBeCopied()
    with pytest.raises(NormswapError) as error:
        normswap.convert(holder, to="gn")
    assert "inplace=True" in error.value.hint
    assert "convert the network within it, .net" in error.value.hint
    holder.net = normswap.convert(holder.net, to="gn")
    assert isinstance(holder.net.bn, nn.GroupNorm)


def test_what_only_trains_and_runs_a_network_is_named() -> None:
    cls = type("YOLO", (type("Model", (nn.Module,), {"__module__": "ultralytics.engine.model"}),), {})
    holder = cls()
    holder.model = randomized(Net())
    for verb in (normswap.inspect, lambda model: normswap.convert(model, to="gn"), normswap.revert):
        with pytest.raises(OptionError) as error:
            verb(holder)
        assert "not a network itself" in error.value.message
        assert "model.model" in error.value.hint
        assert "normswap recipes ultralytics_trainer" in error.value.hint


class Fuses(Net):
    """As ultralytics' networks do before they predict."""

    def is_fused(self) -> bool:
        return not hasattr(self, "bn")

    def fuse(self) -> nn.Module:
        if not self.is_fused():
            self.conv.weight.data /= self.bn.running_var.sqrt().view(-1, 1, 1, 1)
            del self.bn
            self.forward = self.conv.forward
        return self


def test_a_network_that_fuses_its_norms_finds_nothing_to_fuse_until_it_is_reverted(tmp_path: Path) -> None:
    net = randomized(Fuses())
    new = normswap.convert(net, to="gn")
    back = normswap.load(normswap.save(new, tmp_path / "net.safetensors"), Fuses())
    for each in (new, back, copy.deepcopy(new)):
        assert torch.equal(each.fuse()(X), new(X))
    reverted = normswap.revert(back)
    assert contents(reverted) == contents(net)
    assert not reverted.is_fused()
    assert not hasattr(reverted.fuse(), "bn")


def test_a_single_number_beside_the_output_is_proved_too() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.bn(self.conv(x)), self.logit_scale.exp()

    assert normswap.convert(randomized(Scaled()), to="gn")._normswap.check.passed


def test_a_suspect_that_is_the_network_itself_is_kept_by_the_name_that_tables_give_it() -> None:
    class Root(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return nn.functional.batch_norm(y, self.mean, self.var)

    new = normswap.convert(randomized(Root()), rules={"(root)": "keep", "*": "gn"})
    assert isinstance(new.bn, nn.GroupNorm)
    with pytest.raises(OptionError, match=r"'\(root\)' is the network itself"):
        normswap.convert(Root(), rules={"": "keep", "*": "gn"})
