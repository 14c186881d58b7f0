"""The norms of other libraries: found, read and converted, or left alone where they compute something else."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.norms.registry import identify
from normswap.planning.matrix import conversions_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, at import


def script() -> ModuleType:
    """benchmarks/families.py, which makes the table of docs/coverage.md."""
    found = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


FAMILIES = script().FAMILIES
READ = [family for family in FAMILIES if family.read is not None]


def name_of(family: Any) -> str:
    return ".".join([family.path, *map(str, family.kwargs.values())])


def norm_of(family: Any) -> nn.Module:
    """One with a gamma, a beta and statistics that show; gammas of both signs."""
    try:
        module = family.made()
    except ImportError:
        pytest.skip(f"needs {family.distribution}")
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim() == 1:
                drawn = torch.randn(tensor.shape, generator=random)
                tensor.copy_(drawn.abs() + 0.5 if name == "running_var" else drawn)
    return module


def network(norm: nn.Module) -> tuple[nn.Module, Tensor]:
    random = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    if identify(norm).read(norm).channel_dim == 1:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1))
        return net.eval(), torch.randn(4, 3, 6, 6, generator=random)
    return nn.Sequential(nn.Linear(3, 8), norm, nn.Linear(8, 4)).eval(), torch.randn(4, 7, 3, generator=random)


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x.clone())  # in-place layers write to their inputs


@pytest.mark.parametrize("family", READ, ids=name_of)
def test_a_class_is_read_as_its_norm_with_its_own_eps_and_gamma(family: Any) -> None:
    norm = norm_of(family)
    spec = identify(norm)
    assert spec.name == family.read
    state = spec.read(norm)
    assert state.channels == 8
    assert state.eps in {getattr(norm, word, None) for word in ("eps", "variance_epsilon")} | {1e-5}
    if "InPlace" not in family.path:
        assert state.weight is norm.weight


@pytest.mark.parametrize("family", READ, ids=name_of)
def test_a_class_becomes_all_that_its_norm_becomes_exactly(family: Any) -> None:
    norm = norm_of(family)
    net, x = network(norm)
    before = outputs(net, x)
    cells = [cell for cell in conversions_of(norm) if cell.outcome == "exact"]
    assert family.read in {cell.target for cell in cells}
    for cell in cells:
        groups = {"groups": identify(norm).groups(identify(norm).read(norm), None)} if cell.options else {}
        made = normswap.convert(net, cell.target, sources=[family.read], example_inputs=x.clone(), **groups)
        after = outputs(made, x)
        assert float((after - before).norm() / before.norm()) < 1e-5, cell.target
        assert family.path.startswith("torch.") or not any(type(m) is type(norm) for m in made.modules())


@pytest.mark.parametrize("family", [f for f in READ if f.read not in ("ln", "rms", "gn")], ids=name_of)
def test_a_class_becomes_a_group_norm_and_nothing_of_it_is_left(family: Any) -> None:
    net, x = network(norm_of(family))
    made = normswap.convert(net, "gn", groups=2, sources=[family.read], example_inputs=x.clone())
    layer = normswap.inspect(made, x)["1" if isinstance(made[1], nn.GroupNorm) else "1.norm"]
    assert (layer.spec.name, layer.state.num_groups) == ("gn", 2)
    assert torch.isfinite(outputs(made, x)).all()
    left = {"variance_epsilon", "normalized_shape", "activation", "activation_param", "group_size", "data_format"}
    assert not left & set(vars(getattr(made[1], "norm", made[1])))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.read is None], ids=name_of)
def test_a_class_that_computes_something_else_is_left_alone(family: Any) -> None:
    assert identify(norm_of(family)) is None


# --- what counts ------------------------------------------------------------------------------------------------------


class OwnRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, channels: int = 6, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(channels)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class OnePlusRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight * (1 + self.weight)


class OutsideRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class GatedRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * gate.sigmoid()


class WithBufferRMSNorm(OwnRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1))


class RaisingRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not on this machine")


class Scaled(OwnRMSNorm):
    """A norm by what it computes, and nothing of its name says so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    "cls", [OnePlusRMSNorm, OutsideRMSNorm, GatedRMSNorm, WithBufferRMSNorm, RaisingRMSNorm, Scaled]
)
def test_only_the_formula_in_a_module_of_one_input_that_is_called_a_norm_counts(cls: type[nn.Module]) -> None:
    assert identify(cls()) is None


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 7, 96])
def test_any_number_of_channels_is_told(channels: int) -> None:
    assert identify(OwnRMSNorm(channels)).name == "rms"


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5])
def test_any_eps_is_told(eps: float) -> None:
    norm = OwnRMSNorm(eps=eps)
    assert identify(norm).read(norm).eps == eps


def test_gammas_of_zero_hide_nothing() -> None:
    norm, other = OwnRMSNorm(), OnePlusRMSNorm()
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(other.weight)
    assert identify(norm).name == "rms"
    assert identify(other) is None


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.to("meta"), lambda m: m.train()])
def test_neither_dtype_nor_device_nor_training_matters(change: Any) -> None:
    assert identify(change(OwnRMSNorm())).name == "rms"
    assert identify(change(OnePlusRMSNorm())) is None


def test_looking_leaves_no_trace() -> None:
    norm, calls = OwnRMSNorm(), []
    norm.register_forward_hook(lambda *args: calls.append(args))
    before, random = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    weight = norm.weight
    identify(norm)
    assert calls == []
    assert norm.weight is weight
    assert torch.equal(norm.weight, before["weight"])
    assert norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_a_network_of_them_is_listed_frozen_and_converted_with_users_attributes_kept() -> None:
    net = nn.Sequential(nn.Linear(3, 6), OwnRMSNorm(eps=1e-3), nn.Linear(6, 2)).eval()
    net[1].note = "a user's"
    x = torch.randn(2, 5, 3)
    assert "OwnRMSNorm" in str(normswap.inspect(net))
    made = normswap.convert(net, "rms", example_inputs=x)
    assert type(made[1]) is nn.RMSNorm
    assert made[1].note == "a user's"
    assert not hasattr(made[1], "variance_epsilon")
    torch.testing.assert_close(outputs(made, x), outputs(net, x))
    normswap.freeze(net)
    assert not net[1].weight.requires_grad


@functools.cache
def page() -> str:
    return (ROOT / "docs" / "coverage.md").read_text("utf-8")


@pytest.mark.parametrize("family", FAMILIES, ids=name_of)
def test_the_table_of_the_documentation_has_the_class_as_it_is_read(family: Any) -> None:
    rows = re.findall(rf"^\| `{re.escape(family.path)}`[^|]*\| ([^|]*) \|", page(), re.MULTILINE)
    assert (family.read or "not read") in rows


# --- inside networks of the libraries ---------------------------------------------------------------------------------


def test_a_transformer_of_transformers_gives_the_same_with_torch_s_rms_norms() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    net, ids = LlamaModel(config).eval(), torch.arange(6)[None]
    for module in net.modules():
        if identify(module) is not None:
            nn.init.normal_(module.weight)
    made = normswap.convert(net, "rms", sources=["rms"])
    assert sum(type(m) is nn.RMSNorm for m in made.modules()) == 3
    with torch.no_grad():
        torch.testing.assert_close(made(ids).last_hidden_state, net(ids).last_hidden_state)


def test_a_unet_of_monai_becomes_a_fixed_map_with_images() -> None:
    nets = pytest.importorskip("monai.networks.nets", reason="needs monai")
    layers = {"channels": (4, 8), "strides": (2,), "norm": ("instance", {"affine": True})}
    net = nets.UNet(spatial_dims=2, in_channels=1, out_channels=2, **layers).eval()
    x = torch.randn(8, 1, 16, 16)
    made = normswap.convert(net, "fused", missing_statistics="later")
    report = normswap.calibrate(made, net, x)
    assert report.drift_after < min(0.7, report.drift_before)
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in made.modules())


def test_a_network_of_nn_u_net_becomes_one_of_group_norms() -> None:
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="needs dynamic-network-architectures"
    )
    net = unet.PlainConvUNet(
        1, 2, (4, 8), nn.Conv3d, 3, (1, 2), (1, 1), 2, (1,), True, nn.InstanceNorm3d, {"affine": True, "eps": 1e-5},
        nonlin=nn.LeakyReLU,
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 8, 8, 8)
    made = normswap.convert(net, "gn", channels_per_group=1, example_inputs=x)  # then it is the same
    assert sum(isinstance(m, nn.GroupNorm) for m in made.modules()) == 3
    torch.testing.assert_close(outputs(made, x), outputs(net, x), rtol=1e-4, atol=1e-5)


class OfVolumes(nn.BatchNorm3d):
    """As timm_3d's BatchNormAct3d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class OfAnyDims(nn.modules.batchnorm._BatchNorm):
    """As asteroid's BatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() in (3, 4)


@pytest.mark.parametrize(
    ("cls", "path", "conv", "shape"),
    [
        (OfVolumes, "timm_3d.layers.norm_act.BatchNormAct3d", nn.Conv3d, (2, 3, 4, 4, 4)),
        (OfAnyDims, "asteroid.masknn.norms.BatchNorm", nn.Conv1d, (2, 3, 9)),
    ],
)
def test_batch_norms_of_volumes_and_of_sound_become_what_others_do(
    cls: Any, path: str, conv: Any, shape: tuple[int, ...]
) -> None:
    cls = sys.modules["families"].stand_in(cls, path)
    torch.manual_seed(0)
    norm = cls(8)
    norm.running_mean.copy_(torch.randn(8))
    norm.running_var.copy_(torch.rand(8) + 0.5)
    net, x = nn.Sequential(conv(3, 8, 1), norm, conv(8, 2, 1)).eval(), torch.randn(shape)
    for to in ("fused", "frozen", "bn"):
        torch.testing.assert_close(outputs(normswap.convert(net, to, example_inputs=x), x), outputs(net, x))
    assert not any(type(m) is cls for m in normswap.convert(net, "gn", groups=2, example_inputs=x).modules())
