"""Converted parts of a network: their record becomes that of the whole, which is saved, trained and reverted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from detectors import worn
from torch import Tensor, nn
from torchvision import models

import normswap
from normswap.conversion.composite import adopt_part_records
from normswap.conversion.record import record_of
from normswap.conversion.stabilize import factors_in
from normswap.detection import detector
from normswap.errors import WeightsError


def part(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return worn(nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()


def pair(first: nn.Module, second: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(first, second, nn.Flatten(), nn.LazyLinear(2)).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_a_whole_with_two_converted_parts_is_saved_loaded_and_reverted(x: Tensor, tmp_path: Path) -> None:
    original = pair(part(), part(8))
    original(x)  # the lazy layer
    model = copy.deepcopy(original)
    model[0] = normswap.convert(model[0], "gn", groups=2)
    model[1] = normswap.convert(model[1], "ln")
    file = normswap.save(model, tmp_path / "whole.safetensors")
    assert record_of(model) is None  # saving changes nothing
    assert [(s.path, s.target, s.producers) for s in adopt_part_records(model).plan.steps] == [
        ("0.1", "gn", ("0.0",)), ("1.1", "ln", ("1.0",)),
    ]  # fmt: skip
    loaded = normswap.load(file, model=copy.deepcopy(original))
    assert torch.equal(loaded(x), model(x))
    assert equal(normswap.revert(loaded), original)
    assert equal(normswap.revert(model), original)


def test_a_file_is_loaded_into_what_is_converted_in_the_same_way_already(x: Tensor, tmp_path: Path) -> None:
    original = part()
    model = normswap.convert(original, "gn", groups=2)
    file = normswap.save(model, tmp_path / "part.safetensors")
    other = part()
    with torch.no_grad():
        other[0].weight.mul_(3)
    again = normswap.load(file, model=normswap.convert(other, "gn", groups=2))
    assert torch.equal(again(x), model(x))
    assert equal(normswap.revert(again), original)
    with pytest.raises(WeightsError, match="does not fit"):
        normswap.load(file, model=normswap.convert(original, "gn", groups=4))


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "layers": models.resnet18,
    "features": models.mobilenet_v3_small,
    "timm": lambda: timm.create_model("mobilenetv3_small_050", features_only=True),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_detector_on_a_converted_backbone_is_a_converted_network(name: str, tmp_path: Path) -> None:
    def built(backbone: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"min_size": 64, "max_size": 64}
        return detector("retinanet", backbone=backbone, num_classes=3, width=32, groups=8, **sizes).eval()

    original = worn(BACKBONES[name]()).eval()
    for buffer_name, buffer in original.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.mul_(64)  # so that a fold makes weights small
    model = built(normswap.convert(original, "gn"))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in built(original).modules())
    assert len(record_of(model).plan.steps) == norms
    assert [m for m in model.modules() if record_of(m) is not None] == [model]
    with normswap.stabilized(model):
        assert factors_in(model)
    file = normswap.save(model, tmp_path / "detector.safetensors")
    images = [torch.rand(3, 64, 48)]
    for start in (original, normswap.convert(original, "gn")):
        loaded = normswap.load(file, model=built(copy.deepcopy(start)))
        assert torch.equal(loaded(images)[0]["scores"], model(images)[0]["scores"])
    assert equal(normswap.revert(model), built(original))


def test_training_a_whole_leaves_the_part_stabilized_and_a_file_that_loads(x: Tensor, tmp_path: Path) -> None:
    original = nn.Sequential(part(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = copy.deepcopy(original)
    model[0] = normswap.convert(model[0], "gn", groups=2)
    eps = model[0][1].eps
    data = (x.repeat(4, 1, 1, 1), torch.arange(8) % 2)
    report = normswap.finetune(model, data, steps=2, batch_size=4, device="cpu", output=tmp_path / "run")
    assert model[0][1].eps == eps
    loaded = normswap.load(report.last_file, model=copy.deepcopy(original))
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_a_new_head_of_a_part_is_in_the_file_of_the_whole(x: Tensor, tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        return nn.Sequential(part(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    model = normswap.convert(classifier(), "gn", groups=2)
    normswap.finetune(model, (x.repeat(4, 1, 1, 1), torch.arange(8) % 5), num_classes=5, steps=1, device="cpu")
    whole = nn.Sequential(nn.Identity(), model).eval()
    file = normswap.save(whole, tmp_path / "whole.safetensors")
    loaded = normswap.load(file, model=nn.Sequential(nn.Identity(), classifier()))
    assert loaded(x).shape == (2, 5)
    assert torch.equal(loaded(x), whole(x))


def test_a_part_is_saved_at_its_own_size_while_it_is_stabilized(x: Tensor, tmp_path: Path) -> None:
    first = part()
    with torch.no_grad():
        first[1].running_var.mul_(64)
    whole = nn.Sequential(normswap.convert(first, "gn", groups=2))
    before = copy.deepcopy(whole)
    with normswap.stabilized(whole):
        assert not equal(whole, before)
        file = normswap.save(whole, tmp_path / "whole.safetensors")
    assert equal(whole, before)
    assert whole[0][1].eps == before[0][1].eps
    assert equal(normswap.load(file, model=nn.Sequential(part())), before)


def test_a_network_converted_twice_is_reverted_twice_as_a_part(x: Tensor) -> None:
    original = part()
    once = normswap.convert(original, "frozen")
    twice = normswap.convert(once, "gn", groups=2, sources=["frozen"])
    whole = nn.Sequential(twice)
    adopt_part_records(whole)
    assert equal(normswap.revert(whole), nn.Sequential(once))
    assert equal(normswap.revert(whole), nn.Sequential(original))
