"""Files that normswap writes: round trips and how they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import Small, flags, small, written
from helpers import bits, classes, contents, randomized, relative, run
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import DenseNet, get_model

import normswap
from normswap.checkpoint.manifest import is_ours, read_manifest
from normswap.checkpoint.saving import load, save, save_state
from normswap.conversion.history import Calibrated
from normswap.conversion.record import record_of
from normswap.conversion.revert import revert
from normswap.errors import RevertError

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGETS = ["gn", "frozen", "fused", "ln", "renorm", "sync"]


def resnet() -> nn.Module:
    return randomized(get_model("resnet18", weights=None, num_classes=4))


def mobilenet() -> nn.Module:
    return randomized(get_model("mobilenet_v3_small", weights=None, num_classes=4))


def densenet() -> nn.Module:
    """Pre-activation: most of its norms are prescaled, not folded. No torchvision name builds it."""
    return randomized(DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4))


def norm_facts(model: nn.Module) -> list[Any]:
    """Class, eps, momentum and flags of each batch norm."""
    return [
        (path, type(m), m.eps, m.momentum, m.affine, m.track_running_stats)
        for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "own", "to"),
    [*((mobilenet, False, to) for to in TARGETS), *((densenet, True, to) for to in TARGETS), (resnet, False, "gn")],
)
def test_a_round_trip_keeps_every_bit_and_can_still_be_undone(
    tmp_path: Path, make: Callable[[], nn.Module], own: bool, to: str
) -> None:
    original = make()
    converted = normswap.convert(original, to, check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=make() if own else None)
    assert contents(loaded) == contents(converted)
    assert classes(loaded) == classes(converted)
    assert repr(loaded) == repr(converted)
    assert relative(run(converted, IMAGE), run(loaded, IMAGE)) < 1e-5
    back = revert(loaded)
    assert contents(back) == contents(original)
    assert norm_facts(back) == norm_facts(original)
    assert repr(back) == repr(original)
    assert relative(run(original, IMAGE), run(back, IMAGE)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("to", ["gn", "frozen", "fused"])
def test_a_network_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype, to: str) -> None:
    original = small().to(dtype)
    converted = normswap.convert(original, to, check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert contents(loaded) == contents(converted)
    assert {b.dtype for b in loaded.buffers() if b.is_floating_point()} <= {dtype}
    assert loaded(IMAGE.to(dtype)).dtype == dtype
    assert contents(revert(loaded)) == contents(original)


def test_a_network_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    original = small()
    original[3].to(torch.float64)
    converted = normswap.convert(original, "frozen", check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert contents(loaded) == contents(converted)


def test_a_network_in_channels_last_keeps_its_memory_format(tmp_path: Path) -> None:
    converted = normswap.convert(small().to(memory_format=torch.channels_last), "gn")
    strides = [p.stride() for p in converted.parameters()]
    assert strides[0] == (27, 1, 9, 3)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert [p.stride() for p in loaded.parameters()] == strides
    assert contents(loaded) == contents(converted)


@pytest.mark.parametrize("to", ["gn", "frozen", "fused", "renorm"])
def test_requires_grad_is_kept_and_comes_back_on_revert(tmp_path: Path, to: str) -> None:
    original = small()
    original[0].weight.requires_grad_(False)
    original[1].weight.requires_grad_(False)
    original[1].bias.requires_grad_(False)
    original[4].bias.requires_grad_(False)
    converted = normswap.convert(original, to)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert flags(loaded) == flags(converted)
    assert flags(revert(loaded)) == flags(original)


def test_a_given_network_with_other_flags_gets_those_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert all(flags(load(file, model=small().requires_grad_(False))).values())


class Holding(Small):
    """With a buffer that is in no state dict, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(0, 1, 8).view(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.tail = nn.Linear(8, 8, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = self[i](x)
        return self.tail(self.head((x + self.grid).mean((2, 3))))


def test_buffers_that_no_state_dict_holds_are_those_of_the_rebuilt_network(tmp_path: Path) -> None:
    original = randomized(Holding())
    converted = normswap.convert(original, "gn")
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=Holding())
    assert "grid" not in load_file(tmp_path / "a.safetensors")
    assert relative(run(converted, IMAGE), run(loaded, IMAGE)) < 1e-6


def test_tied_parameters_are_written_once_and_are_one_again(tmp_path: Path) -> None:
    converted = normswap.convert(randomized(Holding()), "gn")
    file = save(converted, tmp_path / "a.safetensors")
    names = [k for k in load_file(file) if k in ("head.weight", "tail.weight")]
    assert len(names) == 1
    loaded = load(file, model=Holding())
    assert loaded.head.weight is loaded.tail.weight
    untied = Holding()
    untied.tail.weight = nn.Parameter(torch.zeros(8, 8))
    loaded = load(file, model=untied)
    assert loaded.head.weight is loaded.tail.weight
    assert torch.equal(loaded.tail.weight, converted.head.weight)


def test_aliased_modules_stay_one_module(tmp_path: Path) -> None:
    def build() -> nn.Module:
        block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        return nn.Sequential(block, nn.ReLU(), block)

    original = randomized(build())
    converted = normswap.convert(original, "gn", groups=1)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=build())
    assert loaded[0] is loaded[2]
    assert type(loaded[0][1]) is type(converted[0][1])
    assert contents(loaded) == contents(converted)
    assert contents(revert(loaded)) == contents(original)


def test_a_root_that_is_itself_a_norm_makes_the_round_trip(tmp_path: Path) -> None:
    original = randomized(nn.BatchNorm2d(8))
    converted = normswap.convert(original, "gn", groups=2)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=nn.BatchNorm2d(8))
    assert contents(loaded) == contents(converted)
    assert contents(revert(loaded)) == contents(original)


def test_a_loaded_network_is_in_eval_mode_and_can_be_saved_again(tmp_path: Path) -> None:
    file = save(normswap.convert(resnet().train(), "gn", check=False), tmp_path / "a.safetensors")
    loaded = load(file)
    assert not any(m.training for m in loaded.modules())
    again = save(loaded, tmp_path / "b.safetensors")
    assert {k: bits(v) for k, v in load_file(again).items()} == {k: bits(v) for k, v in load_file(file).items()}
    assert read_manifest(again) == read_manifest(file)


def test_a_loaded_network_can_be_saved_over_the_file_its_weights_are_mapped_from(tmp_path: Path) -> None:
    file = written(tmp_path)
    before = contents(load(file, model=small()))
    save(load(file, model=small()), file, overwrite=True)
    assert contents(load(file, model=small())) == before


def test_saving_changes_neither_the_network_nor_the_random_state(tmp_path: Path) -> None:
    converted = normswap.convert(resnet(), "gn", check=False)
    before, state = contents(converted), torch.get_rng_state()
    save(converted, tmp_path / "a.safetensors")
    assert contents(converted) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_calibrated_network_is_restored_and_a_trained_one_is_not(tmp_path: Path) -> None:
    original = small()
    converted = normswap.convert(original, "gn")
    with torch.no_grad():
        converted[1].weight.mul_(1.5)
        converted[4].bias.add_(0.25)
    trained = load(save(converted, tmp_path / "trained.safetensors"), model=small())
    with pytest.raises(RevertError, match="the first is 1"):
        revert(trained)
    record_of(converted).history.append(Calibrated(8))
    loaded = load(save(converted, tmp_path / "calibrated.safetensors"), model=small())
    assert contents(loaded) == contents(converted)
    assert record_of(loaded).history == [Calibrated(8)]
    assert contents(revert(loaded)) == contents(original)


def test_a_conversion_that_kept_nothing_cannot_be_undone_after_loading(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, undo=False), model=small())
    assert not any("undo" in name for name in load_file(tmp_path / "a.safetensors"))
    with pytest.raises(RevertError, match="kept nothing"):
        revert(loaded)


def test_the_manifest_says_what_was_done_with_what(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path, model=resnet(), groups=16))
    assert manifest["format"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["normswap"] == normswap.__version__
    assert manifest["source"]["name"] == "resnet18"
    assert manifest["source"]["args"] == {"num_classes": 4}
    assert len(manifest["plan"]["steps"]) == 20
    assert manifest["plan"]["steps"][0]["options"]["num_groups"] == 16
    assert 0 < manifest["check"]["error"] < 1e-4
    assert str(tmp_path) not in json.dumps(manifest)


# --- how it is loaded -----------------------------------------------------------------------------------------------


def test_loading_initialises_no_weights_and_maps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, model=resnet(), check=False)
    initialised = []

    def watch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def init(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not tensor.is_meta:
                initialised.append(tensor.shape)
            return original(tensor, *args, **kwargs)

        return init

    for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, watch(getattr(nn.init, name)))
    state = torch.get_rng_state()
    loaded = load(file)
    assert initialised == []
    assert torch.equal(torch.get_rng_state(), state)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()
    monkeypatch.undo()
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_a_detectors_frozen_norms_and_eps_survive_a_round_trip_of_its_source(tmp_path: Path) -> None:
    from normswap.sources.resolve import outline, parse

    model, source = outline(parse("retinanet_resnet50_fpn"), "COCO_V1")
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    before = [m.eps for m in model.modules() if "FrozenBatchNorm" in type(m).__name__]
    assert before == [0.0] * 53
    converted = normswap.convert(model, "gn", sources=["frozen"], check=False, undo=False, inplace=True)
    record_of(converted).source = source.to_dict()
    file = save(converted, tmp_path / "a.safetensors")
    loaded = load(file)
    assert repr(loaded) == repr(converted)
    assert not any("BatchNorm" in type(m).__name__ for m in loaded.modules())


# --- a plain state dict -------------------------------------------------------------------------------------------


def test_a_state_dict_is_written_with_tied_tensors_under_each_name(tmp_path: Path) -> None:
    model = randomized(Holding())
    file = save_state(model, tmp_path / "a.safetensors")
    assert {k: bits(v) for k, v in load_file(file).items()} == {k: bits(v) for k, v in model.state_dict().items()}
    assert not is_ours(file)
    Holding().load_state_dict(load_file(file))


@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel"])
@pytest.mark.parametrize("branch", ["conv", "sum"])
def test_a_norm_that_calibrate_gave_gamma_and_beta_is_loaded_with_them(tmp_path: Path, to: str, branch: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y if branch == "conv" else y + y.flip(0))

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(4, 3, 8, 8)
    converted = normswap.convert(net, to, example_inputs=x).eval()
    normswap.calibrate(converted, reference=net, data=x)
    normswap.save(converted, tmp_path / "net.safetensors")
    loaded = normswap.load(tmp_path / "net.safetensors", model=Net())
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), converted(x))
