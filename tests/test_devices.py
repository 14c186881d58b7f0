"""Nothing that normswap makes is on another device than the network: walked on CUDA devices that are pretended.

Real CUDA refuses tensors of two devices, and so do these; each walk is also made with a fault in it, which it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_stand_in import OnCuda, pretended_cuda
from torch import Tensor, nn

import normswap
from normswap.calibration import matching
from normswap.conversion import exact_scaling, stabilize
from normswap.demo.digits import split
from normswap.distillation import feature_loss
from normswap.errors import OptionError
from normswap.finetuning.engine import trainer

CUDA = torch.device("cuda", 0)


def small() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    made = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    made(IMAGES)  # running statistics that are nothing special
    return made.eval()


IMAGES, LABELS = split()[0].images[:12], split()[0].labels[:12]


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with pretended_cuda(2):
        yield


def converted() -> nn.Module:
    return normswap.convert(small().to(CUDA), "gn", groups=2)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def calibrated() -> nn.Module:
    model = converted()
    normswap.calibrate(model, small().to(CUDA), IMAGES)
    return model


def distilled() -> nn.Module:
    model = converted()
    normswap.distil(model, data=IMAGES, steps=2, batch_size=4)
    return model


def fine_tuned(device: str = "cuda", **more: Any) -> nn.Module:
    model, part = converted(), (IMAGES[:4], LABELS[:4])
    normswap.finetune(model, (IMAGES, LABELS), part, batch_size=4, steps=2, workers=0, device=device, **more)
    return model


def stabilized() -> nn.Module:
    model = converted()
    with normswap.stabilized(model):
        F.cross_entropy(model(IMAGES.to(CUDA)), LABELS.to(CUDA)).backward()
    return model


WALKS: dict[str, Callable[[], nn.Module]] = {
    walk.__name__: walk for walk in (converted, calibrated, distilled, fine_tuned, stabilized)
}


def test_the_stand_in_refuses_two_devices_and_takes_what_cuda_takes() -> None:
    here, there = torch.ones(3), torch.ones(3).to("cuda:0")
    assert (there.device, there.is_cuda, torch.zeros(2, device="cuda:1").device.index) == (CUDA, True, 1)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        there + here.to("cuda:1")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert there[torch.tensor([0, 2])].tolist() == [1, 1]
    there.copy_(torch.arange(3.0))
    assert torch.equal(there.cpu(), torch.arange(3.0))


@pytest.mark.parametrize("name", WALKS)
def test_all_tensors_of_a_walk_are_on_its_device(name: str) -> None:
    model = WALKS[name]()
    assert {p.device for p in [*model.parameters(), *model.buffers()]} == {CUDA}
    assert all(bool(v.isfinite().all()) for v in values(model).values())


def test_what_is_made_on_cuda_is_what_is_made_on_the_cpu() -> None:
    plain = normswap.convert(small(), "gn", groups=2)
    normswap.calibrate(plain, small(), IMAGES)
    for name, value in values(calibrated()).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
    back = values(normswap.revert(converted()))
    assert all(torch.equal(back[name], value) for name, value in small().state_dict().items())


@pytest.mark.parametrize(
    ("name", "place", "function"),
    [
        ("converted", exact_scaling, "by_output_channel"),
        ("calibrated", matching, "rows_of"),
        ("distilled", feature_loss, "distance"),
        ("stabilized", stabilize, "by_output_channel"),
    ],
)
def test_a_tensor_of_the_cpu_on_the_way_is_found(
    name: str, place: ModuleType, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function gets its first tensor from the wrong device."""
    right = getattr(place, function)

    def misplaced(*args: Any) -> Any:
        at = next(i for i, value in enumerate(args) if isinstance(value, Tensor))
        return right(*args[:at], args[at].cpu(), *args[at + 1 :])

    monkeypatch.setattr(place, function, misplaced)
    with pytest.raises(Exception, match="same device"):
        WALKS[name]()


def test_a_batch_that_stays_on_the_cpu_is_found_in_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "on_device", lambda content, device, **_: content)
    with pytest.raises(Exception, match="same device"):
        fine_tuned()


@pytest.mark.parametrize("more", [{"ema": 0.9}, {"distil": 0.5}, {"mixup": 0.2}, {"num_classes": 12}], ids=str)
def test_fine_tuning_with_more_in_it_stays_on_the_device(more: dict[str, Any]) -> None:
    assert {p.device for p in fine_tuned(**more).parameters()} == {CUDA}


def test_a_reference_of_the_cpu_goes_to_the_network_for_the_time_of_a_calibration() -> None:
    reference, model = small(), converted()
    reference._apply(lambda tensor: OnCuda(tensor.detach().clone(), torch.device("cpu")))
    normswap.calibrate(model, reference, IMAGES)
    assert {p.device for p in reference.parameters()} == {torch.device("cpu")}
    expected = values(calibrated())
    assert all(torch.equal(value, expected[name]) for name, value in values(model).items())


def test_fine_tuning_takes_the_gpu_that_is_named() -> None:
    model = normswap.convert(small(), "gn", groups=2)
    normswap.finetune(model, (IMAGES, LABELS), batch_size=4, steps=1, workers=0, device="cuda:1")
    assert {p.device for p in model.parameters()} == {torch.device("cuda", 1)}
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("device", ["cuda:2", "mps", "cuda:", "cuda:x", "cpu:1"])
def test_fine_tuning_refuses_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(OptionError, match="device"):
        normswap.finetune(small(), (IMAGES, LABELS), steps=1, device=device)


def test_one_gpu_is_no_place_for_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="cuda:1 is one GPU"):
        normswap.finetune(small(), (IMAGES, LABELS), steps=1, device="cuda:1")
