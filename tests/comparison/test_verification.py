"""verify: against NumPy on a hand-made network, and on a real one."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, Residual, X, fingerprint, randomized, relative
from resnet20 import resnet20
from torch import Tensor, nn

import normswap
from normswap.comparison.layers import Difference, comparable_paths
from normswap.comparison.verification import first_jump, verify
from normswap.data import Preprocess, open_images
from normswap.errors import DataError, OptionError


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs real images and weights, which are not part of the repository")
    return folder


def small(classes: int = 5) -> nn.Sequential:
    """(N, 3, H, W) -> (N, classes), its ReLU in place, as most networks have it."""
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    return randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)))


def by_hand(model: nn.Sequential, images: Tensor) -> dict[str, np.ndarray]:
    """The outputs of `small`'s layers, in NumPy and float64."""

    def numbers(tensor: Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    conv, bn, linear = model[0], model[1], model[5]
    out = {"0": np.einsum("nihw,oi->nohw", numbers(images), numbers(conv.weight)[:, :, 0, 0])}
    out["0"] += numbers(conv.bias)[:, None, None]
    scale = numbers(bn.weight) / np.sqrt(numbers(bn.running_var) + bn.eps)
    centred = out["0"] - numbers(bn.running_mean)[:, None, None]
    out["1"] = centred * scale[:, None, None] + numbers(bn.bias)[:, None, None]
    out["5"] = np.maximum(out["1"], 0).mean((2, 3)) @ numbers(linear.weight).T + numbers(linear.bias)
    return out


def changed(model: nn.Module, path: str, by: float = 0.5) -> nn.Module:
    """A copy with noise on one layer's weight."""
    other = copy.deepcopy(model)
    weight = other.get_parameter(f"{path}.weight")
    weight.data += by * torch.randn_like(weight)
    return other


class Part(nn.Module):
    """Some networks' forward does not return a tensor."""

    def __init__(self, model: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.model(x))


@pytest.mark.parametrize("batch_size", [64, 5, 1])
def test_every_figure_equals_numpys(batch_size: int) -> None:
    a = small()
    b = changed(changed(a, "1"), "5")
    images, labels = torch.randn(17, 3, 6, 7), torch.randint(5, (17,))
    x, y = by_hand(a, images), by_hand(b, images)
    report = verify(a, b, list(zip(images.split(batch_size), labels.split(batch_size), strict=True)))
    assert [layer.path for layer in report.layers] == ["1", "5"]
    for layer in report.layers:
        expected = np.linalg.norm(x[layer.path] - y[layer.path]) / np.linalg.norm(x[layer.path])
        assert layer.error == pytest.approx(expected, rel=1e-5)
        assert layer.max_abs == pytest.approx(np.abs(x[layer.path] - y[layer.path]).max(), rel=1e-5)
    assert (report.images, report.labelled, report.random_inputs) == (17, 17, False)
    assert (report.error, report.max_abs) == (report.layers[1].error, report.layers[1].max_abs)
    assert report.agreement == np.mean(x["5"].argmax(1) == y["5"].argmax(1))
    assert report.accuracy_a == np.mean(x["5"].argmax(1) == labels.numpy())
    assert report.accuracy_b == np.mean(y["5"].argmax(1) == labels.numpy())
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x["5"], y["5"]))
    assert report.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)


def test_a_network_does_not_differ_from_itself() -> None:
    model = small()
    report = verify(model, model, torch.randn(4, 3, 8, 8))
    assert (report.error, report.max_abs, report.kl, report.agreement, report.first_jump) == (0, 0, 0, 1, None)
    assert [layer.error for layer in report.layers] == [0, 0]
    assert report.accuracy_a is None
    assert report.accuracy_b is None


def test_both_networks_are_left_as_they_were() -> None:
    a = nn.Sequential(Residual(), Residual())
    b = normswap.convert(a, to="gn", groups=2)
    a.train()
    a[1].bn1.eval()
    handles = [model[0].bn1.register_forward_hook(lambda *_: None) for model in (a, b)]
    x = torch.randn(4, 4, 8, 8)
    before = [fingerprint(model) for model in (a, b)], torch.get_rng_state()
    verify(a, b, x, device="cpu")
    verify(a, b)
    assert [fingerprint(model) for model in (a, b)] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert len(handles) == 2
    assert torch.is_grad_enabled()


def test_folded_layers_are_not_compared_and_their_norms_are() -> None:
    model = nn.Sequential(Residual(), Residual(), nn.Conv2d(4, 2, 1))
    randomized(model)
    norms = ["0.bn1", "0.bn2", "1.bn1", "1.bn2"]
    folded = normswap.convert(model, to="gn", groups=2)
    assert comparable_paths(model, folded) == comparable_paths(folded, model) == [*norms, "2"]
    copied = normswap.convert(model, to="gn", groups=2, transfer="copy")
    assert "0.conv1" in comparable_paths(model, copied)
    assert comparable_paths(model, copy.deepcopy(model)) == [*norms, "2"]  # without a record, folding is possible


def test_an_exact_conversion_shows_no_difference() -> None:
    model = randomized(nn.Sequential(Residual(), Residual()))
    report = verify(model, normswap.convert(model, to="frozen"), torch.randn(4, 4, 8, 8))
    assert len(report.layers) == 8  # nothing was folded into the convolutions
    assert report.first_jump is None
    assert report.worst is not None
    assert report.worst.error < 1e-5
    fused = verify(model, normswap.convert(model, to="fused"), torch.randn(4, 4, 8, 8))
    assert len(fused.layers) == 4
    assert fused.first_jump is None


def test_a_single_broken_layer_is_named() -> None:
    model = randomized(nn.Sequential(*(Residual() for _ in range(4))))
    report = verify(model, changed(model, "2.bn1"), torch.randn(4, 4, 8, 8))
    assert report.first_jump == "2.bn1"
    assert [layer.error > 0 for layer in report.layers] == [False] * 4 + [True] * 4
    assert report.error == pytest.approx(report.outputs[0].error)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([], None),
        ([1e-7, 3e-5, 9e-5], None),  # rounding that grows
        ([1e-7, 1e-5, 2e-4], 2),
        ([0.2, 0.3, 0.9], 0),
        ([1e-3, 9e-3, 0.08], 0),
        ([2e-5, 1.5e-4, 2e-3], 2),  # the second is no more than ten times the first
        ([0.0, 0.0, math.inf], 2),
    ],
)
def test_a_jump_is_ten_times_what_came_before(errors: list[float], expected: int | None) -> None:
    layers = [Difference(str(i), error, 0.0) for i, error in enumerate(errors)]
    assert first_jump(layers) == (None if expected is None else str(expected))


def test_rounding_of_half_precision_is_no_jump() -> None:
    model = randomized(nn.Sequential(Residual(), Residual()))
    report = verify(model, copy.deepcopy(model).bfloat16(), torch.randn(4, 4, 8, 8))
    assert report.worst is not None
    assert 1e-4 < report.worst.error < 0.05
    assert report.first_jump is None


def test_nan_is_an_infinite_error_and_valid_json() -> None:
    a = small()
    b = copy.deepcopy(a)
    b[1].bias.data[0] = math.nan
    report = verify(a, b, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))])
    assert (report.error, report.kl, report.agreement, report.accuracy_b) == (math.inf, math.inf, 0, 0)
    assert report.first_jump == "1"
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["error"], values["layers"][0]) == ("inf", {"path": "1", "error": "inf", "max_abs": "inf"})


def test_without_data_inputs_are_random_and_the_report_says_so() -> None:
    a = small()
    first, second = verify(a, changed(a, "1")), verify(a, a)
    assert first.random_inputs
    assert second.random_inputs
    assert first.images == 8
    assert str(first).startswith("8 random inputs (no data given)\noutput: relative error ")


def test_without_data_and_a_known_input_there_is_nothing_to_run() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(DataError, match=r"no input is known that Odd runs on.*\n.*with data"):
        verify(Odd(), Odd())


def test_networks_of_different_structure_are_compared_at_the_output() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    report = verify(small(), Part(other, lambda x: x), torch.randn(6, 3, 8, 8))
    assert report.layers == ()
    assert report.agreement is not None
    assert report.notes == ("no layer has the same path in both networks; only the outputs were compared",)


def test_layers_of_other_shapes_are_left_out_and_said() -> None:
    a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    b = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    report = verify(a, b, torch.randn(2, 3, 4, 4))
    assert [layer.path for layer in report.layers] == ["2"]
    assert report.notes == ("a layer was left out, since the outputs differ in number or shape: 0",)


def test_a_layer_used_twice_is_compared_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int = 2) -> None:
            super().__init__()
            self.bn, self.times = randomized(nn.BatchNorm2d(3)), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.bn(x)
            return x

    a, b, x = Twice(), Twice(), torch.randn(2, 3, 4, 4)
    b.bn.weight.data *= 1.1
    with torch.no_grad():
        calls = [torch.stack([m.bn(x), m.bn(m.bn(x))]).double() for m in (a.eval(), b.eval())]
    (layer,) = verify(a, b, x).layers
    assert layer.error == pytest.approx(float((calls[0] - calls[1]).norm() / calls[0].norm()), rel=1e-5)
    assert verify(a, Twice(3), x).layers == ()


def test_every_form_of_output_is_compared() -> None:
    a = small()
    b, x = changed(a, "5"), torch.randn(6, 3, 8, 8)
    plain = verify(a, b, x)
    wraps = [lambda y: (y, None), lambda y: {"logits": y, "loss": None}, lambda y: [{"deep": (y,)}]]
    for wrap in wraps:
        report = verify(Part(a, wrap), Part(b, wrap), x)
        assert (report.error, report.agreement, report.kl) == (plain.error, plain.agreement, plain.kl)
    report = verify(Part(a, lambda y: (y, y[:, :2] * 3)), Part(b, lambda y: (y, y[:, :2] * 3)), x)
    assert [out.path for out in report.outputs] == ["0", "1"]


def test_a_large_batch_in_parts_gives_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    a = small()
    b, seen = changed(a, "1"), []
    b.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    data = [(torch.randn(10, 3, 8, 8), torch.randint(5, (10,)))]
    whole = verify(a, b, data)
    monkeypatch.setattr(
        "normswap.comparison.layers.MEMORY", 4 * (8 * 8 * 8 + 2 * 5) * 4
    )  # four images' norms and outputs
    in_parts = verify(a, b, data)
    assert seen == [10, 4, 4, 2]
    assert in_parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert in_parts.error == pytest.approx(whole.error, rel=1e-5)
    assert (in_parts.accuracy_b, in_parts.images) == (whole.accuracy_b, 10)


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(6):
            x = torch.randn(4, 3, 8, 8)
            alive.append(weakref.ref(x))
            most = max(most, sum(ref() is not None for ref in alive))
            yield x

    model = small()
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    assert verify(model, changed(model, "1"), batches()).images == 24
    assert len(alive) > 12
    assert most <= 4


def test_problems_say_which_network_and_what_to_do() -> None:
    a = small()
    with pytest.raises(DataError, match=r"the first network \(Sequential\) cannot run on the data \(RuntimeError.*\n"):
        verify(a, a, torch.randn(2, 4, 8, 8))
    with pytest.raises(DataError, match=r"the second network \(Sequential\) cannot run"):
        verify(a, nn.Sequential(nn.Linear(7, 5)), torch.randn(2, 3, 8, 8))
    with pytest.raises(DataError, match=r"first gives \(2, 5\), the second \(2, 9\)"):
        verify(a, small(9), torch.randn(2, 3, 8, 8))
    with pytest.raises(OptionError, match="device 'cuda:99' cannot be used"):
        verify(a, a, torch.randn(2, 3, 8, 8), device="cuda:99")
    with pytest.raises(OptionError, match="device 'gpu' cannot be used"):
        verify(a, a, torch.randn(2, 3, 8, 8), device="gpu")


def test_a_failing_network_is_left_as_it_was() -> None:
    a = small().train()
    before = fingerprint(a)
    with pytest.raises(DataError, match="cannot run"):
        verify(a, a, torch.randn(2, 4, 8, 8))
    assert fingerprint(a) == before


def test_the_report_reads_well() -> None:
    a = small()
    data = [(torch.randn(20, 3, 8, 8), torch.randint(5, (20,)))]
    text = str(verify(a, changed(a, "1"), data))
    lines = text.splitlines()
    assert lines[0] == "20 images"
    assert lines[1].startswith("output: relative error 0.")
    assert "agreement 0." in lines[1] or "agreement 1." in lines[1]
    assert lines[2].startswith("accuracy: 0.")
    assert lines[2].endswith(" on 20 labelled images")
    assert lines[3].startswith("layers: 2 compared, worst ")
    assert "first jump at 1 (" in lines[3]
    assert str(verify(a, a, data)).endswith("layers: 2 compared, all equal")


@pytest.mark.slow
def test_outputs_of_transformers_are_compared() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, num_labels=4)
    model = randomized(transformers.ResNetForImageClassification(config))
    other = normswap.convert(model, to="gn", groups=4)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    report = verify(model, other, [{"pixel_values": images, "labels": labels}])
    with torch.no_grad():
        a, b = model(images).logits, other.eval()(images).logits
    assert report.error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    assert report.agreement == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert report.accuracy_b == float((b.argmax(1) == labels).double().mean())
    assert [out.path for out in report.outputs] == ["logits"]


@pytest.mark.slow
def test_detectors_agree_by_their_boxes() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128
    ).eval()
    model.roi_heads.box_predictor.cls_score.bias.data += torch.tensor([0.0, 3.0, 0.0])  # so that it finds something
    images = [[torch.rand(3, 80, 90), torch.rand(3, 90, 70)], [torch.rand(3, 60, 60)]]
    report = verify(model, copy.deepcopy(model), images)
    assert (report.images, report.agreement, report.error, report.kl) == (3, 1, None, None)
    report = verify(model, normswap.convert(model, to="ln"), images)
    assert report.agreement is not None
    assert report.first_jump == "backbone.body.0.1"
    assert not any(layer.path.startswith("roi_heads") for layer in report.layers)
    assert any(layer.path.startswith("rpn") for layer in report.layers)
    assert "boxes agree: F1" in str(report)


def cifar_resnet(folder: Path) -> nn.Module:
    weights = torch.load(folder / "resnet20-cifar10.th", weights_only=True, map_location="cpu")["state_dict"]
    model = resnet20()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    return model.eval()


def test_a_real_network_keeps_most_of_its_accuracy(shared_data: Path) -> None:
    model = cifar_resnet(shared_data)
    data = open_images(shared_data / "cifar10" / "test", limit=100)
    report = verify(model, normswap.convert(model, to="gn", groups=1, check=False), data)
    pixels = torch.stack([_pixels(file) for file in data.files])
    with torch.no_grad():
        expected = (model(pixels).argmax(1) == torch.tensor(data.labels)).float().mean()
    assert report.accuracy_a == pytest.approx(float(expected))
    assert report.accuracy_b is not None
    assert report.accuracy_b > 0.65
    assert len(report.layers) == 20
    assert (report.labelled, report.images) == (100, 100)


@pytest.mark.slow
def test_accuracies_of_the_whole_test_set_are_the_known_ones(shared_data: Path) -> None:
    model = cifar_resnet(shared_data)
    data = open_images(shared_data / "cifar10" / "test").batches(Preprocess(), 100)
    report = verify(model, normswap.convert(model, to="gn", groups=1, check=False), data)
    assert (report.accuracy_a, report.accuracy_b) == (pytest.approx(0.803), pytest.approx(0.773))
    assert report.labelled == 2000


def _pixels(file: Path) -> Tensor:
    """What the README of the weights asks for, without any code of ours."""
    from PIL import Image

    x = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


def test_data_that_is_not_finite_is_to_blame_not_the_network() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(DataError, match="a batch of the data holds NaN or Inf"):
        verify(net, net, torch.full((2, 3, 4, 4), torch.nan))


class Points(Net):
    """Gives as many points as it finds, and a score of the whole."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.bn(self.conv(x))
        return {"points": (y > y.mean() + y.std()).nonzero().float(), "whole": y.mean((2, 3))}


class OnlyPoints(Points):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)["points"]


def test_outputs_of_a_length_that_each_network_finds_are_left_out_with_a_note() -> None:
    a = randomized(Points())
    b = normswap.convert(a, to="ln")
    report = normswap.verify(a, b, [X, X * 2])
    assert [difference.path for difference in report.outputs] == ["whole"]
    assert report.error == pytest.approx(relative(*(torch.cat([n(x)["whole"] for x in (X, X * 2)]) for n in (a, b))))
    assert report.notes[0].startswith("points: of another length in each network, so not compared; the layers' outputs")
    assert {layer.path for layer in report.layers} == {"bn"}
    assert normswap.calibrate(b, a, [X, X * 2]).drift_after is not None


def test_networks_that_give_nothing_else_are_compared_by_their_layers() -> None:
    a = randomized(OnlyPoints())
    report = normswap.verify(a, normswap.convert(a, to="ln"), [X])
    assert report.error is None
    assert report.worst.path == "bn"
    assert "the output: of another length" in str(report)


class PerImage(Points):
    """For each image its points, as many as it has, of two coordinates, and a description of the whole."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.bn(self.conv(x))
        return [{"points": (y[0] > 0.7).nonzero().float(), "whole": y.mean((1, 2))} for y in maps]


def test_points_that_are_as_many_for_some_images_by_chance_are_not_compared_for_these() -> None:
    a = randomized(PerImage())
    b = normswap.convert(a, to="ln", check=False)
    images = torch.randn(12, *X.shape[1:])
    alike = [len(p["points"]) == len(q["points"]) for p, q in zip(a(images), b(images), strict=True)]
    assert 0 < sum(alike) < 12
    chance = images[[i for i, same in enumerate(alike) if same]]
    report = normswap.verify(a, b, [chance, images])
    assert {difference.path.partition(".")[2] for difference in report.outputs} == {"whole"}
    assert report.agreement is None
    assert [note for note in report.notes if note.startswith("points: of another length in each network")]
    report = normswap.distil(b, a, images, steps=1, batch_size=4, eval_data=images)
    assert any(note.startswith("points: of another length in each network") for note in report.notes)


def test_other_classes_are_an_error_still() -> None:
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).eval() for classes in (3, 4))
    with pytest.raises(normswap.DataError, match="cannot be compared"):
        normswap.verify(a, b, [X])
