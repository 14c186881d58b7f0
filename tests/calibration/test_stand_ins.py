"""Calibration without the user's images: photographs, synthetic inputs, and how well inputs fit a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.calibration import fit as fits
from normswap.calibration.fit import fit
from normswap.calibration.stand_ins import Scaling, choose, stand_ins
from normswap.data.photographs import crops, photographs
from normswap.errors import DataError, OptionError


def network(inputs: Tensor, dims: int = 2) -> nn.Module:
    """Two convolutions, each with a BN whose statistics are those that `inputs` cause."""
    torch.manual_seed(0)
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
    model = nn.Sequential(
        conv(inputs.shape[1], 8, 3), norm(8, momentum=None), nn.ReLU(), conv(8, 8, 3), norm(8, momentum=None)
    )
    with torch.no_grad():
        for _ in range(3):
            model(inputs)
    return model.eval()


def normalised(x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_the_photographs_are_many_varied_and_small() -> None:
    from pathlib import Path

    folder = Path(normswap.__file__).parent / "data" / "photographs"
    notice = (folder / "NOTICE.md").read_text("utf-8")
    files = list(folder.glob("*.jpg"))
    assert 10 <= len(files) <= 30
    assert len(photographs()) == len(files)
    assert sum(f.stat().st_size for f in files) <= 1_000_000
    assert all(f"`{f.name}`" in notice for f in files)


def test_crops_are_the_same_for_a_seed_and_within_range() -> None:
    one, two, other = crops(15, (20, 30), seed=1), crops(15, (20, 30), seed=1), crops(15, (20, 30), seed=2)
    assert one.shape == (15, 3, 20, 30)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < one.max() <= 1
    grey = crops(15, (20, 30), channels=1, seed=1)
    luma = (one * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma)


def test_the_distance_is_that_of_the_formula() -> None:
    x = torch.randn(20, 3, 12, 12)
    model = network(x)
    other = 2 * x + 1
    found = fit(model, [(other[:7],), (other[7:],)])
    shares, y = [], other
    for layer in model.requires_grad_(False):
        if isinstance(layer, nn.BatchNorm2d):
            m, s = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0).sqrt()
            d = ((m - layer.running_mean) ** 2 + (s - layer.running_var.sqrt()) ** 2) / (layer.running_var + layer.eps)
            shares.append((d / (1 + d)).mean())
        y = layer(y)
    assert found is not None
    assert found.images == 20
    assert found.distance == pytest.approx(math.sqrt(sum(shares) / 2), rel=1e-4)


def test_inputs_of_the_training_are_told_from_others() -> None:
    x = normalised(crops(64, (24, 24), seed=5))
    model = network(x)
    own, other = fit(model, [(x,)]), fit(model, [(x * 100,)])
    assert own is not None
    assert other is not None
    assert own.verdict == "like what the network was trained on"
    assert other.verdict == "not what the network was trained on"


@pytest.mark.parametrize(
    ("prepare", "name"),
    [
        (normalised, "ImageNet's mean and deviation"),
        (lambda x: x, "0 to 1"),
        (lambda x: 2 * x - 1, "-1 to 1"),
        (lambda x: 255 * x, "0 to 255"),
    ],
)
def test_the_range_of_the_pixels_is_found(prepare, name: str) -> None:
    model = network(prepare(crops(64, (24, 24), seed=5)))
    assert choose(model, (3, 24, 24)).name == name


def test_reversed_colours_are_found_where_they_show() -> None:
    x = crops(64, (24, 24), seed=5) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    coloured = Scaling("", (0.0,) * 3, (1.0,) * 3, bgr=True)(x)
    torch.testing.assert_close(coloured, x.flip(1))


def test_a_network_is_calibrated_without_any_image() -> None:
    x = normalised(crops(64, (24, 24), seed=5))
    model = network(x)
    for kind in ("photos", "synthetic"):
        converted = normswap.convert(model, "gn", groups=2, example_inputs=x[:1])
        report = normswap.calibrate(converted, model, kind, images=26)
        assert report.drift_after < report.drift_before
        assert "3x24x24" in str(report)
        assert converted._normswap.history[-1].stand_ins == report.stand_ins


def test_synthetic_inputs_come_closer_to_the_statistics_than_what_they_start_from() -> None:
    model = network(torch.randn(32, 3, 24, 24) * torch.tensor([0.3, 1.0, 2.0]).view(3, 1, 1))
    scaling = Scaling("", (0.5,) * 3, (0.5,) * 3)
    example = torch.randn(1, 3, 24, 24)
    made = stand_ins("synthetic", model, example, images=16, scaling=scaling)
    start = fit(model, [(scaling(crops(16, (24, 24))),)])
    assert start is not None
    assert made.fit.distance < start.distance / 2
    again = stand_ins("synthetic", model, example, images=16, scaling=scaling)
    assert all(torch.equal(a, b) for a, b in zip(made.batches, again.batches, strict=True))


def test_synthetic_inputs_are_made_for_sequences_too() -> None:
    model = network(torch.randn(64, 5, 100) * 3 + 1, dims=1)
    made = stand_ins("synthetic", model, torch.randn(2, 5, 100), images=16)
    assert made.shape == (5, 100)
    assert made.fit.distance < 0.2
    with pytest.raises(DataError, match="no images"):
        stand_ins("photos", model, torch.randn(2, 5, 100))


def test_photographs_are_refused_where_they_do_not_fit() -> None:
    model = network(torch.randn(32, 3, 24, 24) * 1e4 + 1e5)
    with pytest.raises(DataError, match="not what the network was trained on"):
        stand_ins("photos", model, torch.randn(1, 3, 24, 24))


def test_inputs_that_are_no_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(7)).eval()
    with pytest.raises(DataError, match="something else"):
        stand_ins("synthetic", model, torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(OptionError, match="photos"):
        stand_ins("noise", model)


def test_making_inputs_leaves_the_network_as_it_was() -> None:
    model = network(normalised(crops(64, (24, 24), seed=5))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].weight.requires_grad_(False)
    stand_ins("synthetic", model, torch.randn(1, 3, 24, 24), images=4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_file_remembers_the_shape_of_the_inputs(tmp_path) -> None:
    x = normalised(crops(64, (24, 24), seed=5))
    model = network(x)
    converted = normswap.convert(model, "gn", groups=2, example_inputs=x[:1])
    loaded = normswap.load(normswap.save(converted, tmp_path / "n.safetensors"), model=network(x))
    report = normswap.calibrate(loaded, data="photos", images=13)
    assert "13 crops of photographs 3x24x24" in str(report)


def test_the_report_says_how_images_of_the_users_fit() -> None:
    x = normalised(crops(64, (24, 24), seed=5))
    model = network(x)
    for data, verdict in ((x, "like what"), (100 * x, "not what")):
        converted = normswap.convert(model, "gn", groups=2)
        assert f": {verdict} the network was trained on" in str(normswap.calibrate(converted, model, data))
    assert fits.FITS < fits.ODD


class Padded(nn.Module):
    """Its statistics depend on the size of the images: zeros are drawn in at the borders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if not i else 8, 8, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, momentum=None) for _ in range(4))
        self.halve = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(self.halve(conv(x + 1)).relu())
        return x.mean((2, 3))


def padded(size: int, seed: int = 1) -> nn.Module:
    model = Padded()
    with torch.no_grad():
        model.train()(crops(128, (size, size), seed=seed))
    return model.eval()


@pytest.mark.parametrize("size", [32, 128])
def test_where_the_size_is_not_known_the_statistics_tell_it(size: int) -> None:
    assert stand_ins("photos", padded(size), images=8).shape == (3, size, size)


def test_a_size_that_is_given_is_taken() -> None:
    assert stand_ins("photos", padded(32), torch.rand(1, 3, 48, 48), images=8).shape == (3, 48, 48)


def test_large_inputs_are_made_small_where_those_fit_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.calibration.stand_ins._LARGE_STEPS", 1)
    like, scaling = torch.rand(1, 3, 160, 200), Scaling("0 to 1", (0.0,) * 3, (1.0,) * 3)
    free = network(crops(32, (160, 200)))
    fixed = nn.Sequential(free, nn.Flatten(), nn.Linear(8 * 156 * 196, 2)).eval()
    found = [
        stand_ins(kind, model, like, images=2, scaling=scaling).shape
        for kind, model in (("synthetic", free), ("photos", free), ("synthetic", fixed))
    ]
    assert found == [(3, 128, 160), (3, 160, 200), (3, 160, 200)]


def test_inputs_that_start_far_off_have_to_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that start near are taken as photographs would be; the others only if they end near."""
    near, far = network(crops(64, (32, 32))), network(20 * torch.randn(64, 3, 32, 32))
    monkeypatch.setattr("normswap.calibration.stand_ins._STEPS", 1)
    monkeypatch.setattr("normswap.calibration.stand_ins.MADE", 0.001)
    scaling, like = Scaling("0 to 1", (0.0,) * 3, (1.0,) * 3), torch.rand(1, 3, 32, 32)
    assert stand_ins("synthetic", near, like, images=32, scaling=scaling).fit.distance > 0.001
    with pytest.raises(DataError, match="synthetic"):
        stand_ins("synthetic", far, like, images=32, scaling=scaling)


def test_the_making_of_inputs_tells_how_far_it_is() -> None:
    model = network(crops(64, (32, 32)))
    steps: list[tuple[int, int]] = []
    gn = normswap.convert(model, "gn", groups=2)
    normswap.calibrate(gn, model, "synthetic", images=40, progress=lambda done, total: steps.append((done, total)))
    making = [done for done, total in steps if total == 300]  # two batches of 150 steps at most
    assert making[0] == 0
    assert making[-1] == 300
    assert making == sorted(making)
