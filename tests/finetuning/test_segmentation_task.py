"""Segmentation networks in training: loss, mean IoU, random changes, data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import shapes_folder
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import segmentation as zoo

import normswap
from normswap.data import Preprocess, open_masks
from normswap.errors import DataError, OptionError
from normswap.finetuning.datasets.masks import SegmentationImages
from normswap.finetuning.tasks.segmentation import Overlap, Segmentation
from normswap.heads.classifier import Head, resize_head
from normswap.heads.dense import find_predictor

NETS = '''
import torch
from torch import Tensor, nn


class Pixels(nn.Module):
    """Scores at half the size, as `out` and `aux`."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
        self.aux_classifier = nn.Sequential(nn.Conv2d(8, classes, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.backbone(x)
        return {"out": self.classifier(x), "aux": self.aux_classifier(x)}


def pixels(classes: int = 4) -> Pixels:
    torch.manual_seed(0)
    return Pixels(classes).eval()
'''
exec(NETS)  # the same for tests in this process and for those that start others
pixels: Any = globals()["pixels"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"), 32)


def train(model: nn.Module, data: Any, evaluation: Any = None, **more: Any) -> Any:
    settings = {"task": "segmentation", "device": "cpu", "steps": 2, "batch_size": 2, **more}
    return normswap.finetune(model, data, evaluation, **settings)


class Given(nn.Module):
    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores[: len(x)]


def test_mean_iou_is_that_of_an_independent_count() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 6, 7, generator=generator)
    scores[:, 4] = -99  # class 4 is neither there nor predicted
    masks = torch.randint(0, 4, (2, 6, 7), generator=generator)
    masks[0, :2] = 255
    meter = Overlap()
    meter.add(Given(scores), (list(torch.zeros(2, 3, 6, 7)), list(masks)))
    figures = meter.result(lambda value: value)
    true, found = masks[masks != 255].numpy(), scores.argmax(1)[masks != 255].numpy()
    overlaps = [((true == c) & (found == c)).sum() / ((true == c) | (found == c)).sum() for c in range(4)]
    assert figures["val_miou"] == pytest.approx(np.mean(overlaps))
    assert figures["val_pixel_accuracy"] == pytest.approx((true == found).mean())
    assert figures["val_loss"] == pytest.approx(float(F.cross_entropy(scores, masks, ignore_index=255)), rel=1e-5)


def test_the_loss_counts_known_pixels_and_half_of_the_auxiliary_classifier() -> None:
    torch.manual_seed(1)
    model = pixels()
    images = [torch.rand(3, 8, 8), torch.rand(3, 6, 8)]
    masks = [torch.randint(0, 4, (8, 8)), torch.randint(0, 4, (6, 8))]
    padded = torch.zeros(2, 3, 8, 8)
    wanted = torch.full((2, 8, 8), 255)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        padded[i, :, : image.shape[1]], wanted[i, : mask.shape[0]] = image, mask
    task = Segmentation()
    loss = task.outcome(model, task.collate(list(zip(images, masks, strict=True)))).loss
    output = {k: F.interpolate(v, (8, 8), mode="bilinear") for k, v in model(padded).items()}
    parts = [F.cross_entropy(output[k], wanted, ignore_index=255) for k in ("out", "aux")]
    assert float(loss.detach()) == pytest.approx(float((parts[0] + 0.5 * parts[1]).detach()), rel=1e-5)


def test_a_batch_without_known_pixels_has_loss_zero() -> None:
    task = Segmentation()
    batch = task.collate([(torch.rand(3, 8, 8), torch.full((8, 8), 255))])
    assert float(task.outcome(pixels(), batch).loss.detach()) == 0


@pytest.mark.usefixtures("pictures")
def test_a_run_learns_and_writes_figures_and_pictures(folder: Path, tmp_path: Path) -> None:
    report = train(pixels(), folder, output=tmp_path / "run", epochs=12, steps=None, lr=0.01, augment="flip")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"step", "epoch", "val_loss", "val_miou", "val_pixel_accuracy"}
    assert "pixel_accuracy" in lines[1]
    assert report.figures["val_loss"] < 0.8 * report.before["val_loss"]
    for path in (report.curves, report.examples):
        assert path is not None
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    import signal

    def interrupt(progress: Any) -> None:
        if progress.step > 0:
            signal.raise_signal(signal.SIGINT)

    train(pixels(), folder, output=tmp_path / "whole", steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(pixels(), folder, output=tmp_path / "cut", steps=6, progress=interrupt)
    train(pixels(), folder, output=tmp_path / "cut", steps=6, resume=True)
    first, second = (normswap.load(tmp_path / n / "last.safetensors", model=pixels()) for n in ("whole", "cut"))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_image_and_mask_change_together(tmp_path: Path) -> None:
    """The image's red is its class, so that it must fit the mask after any scaling, cropping and mirroring."""
    generator = np.random.default_rng(0)
    mask = np.repeat(np.repeat(generator.integers(0, 4, (4, 4)), 16, 0), 16, 1).astype(np.uint8)
    Image.fromarray(np.stack([mask * 60] * 3, -1)).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    prepare = Preprocess(size="native", mean=(0.0,), std=(1.0,))
    data = SegmentationImages(open_masks(tmp_path), prepare, changes="auto", crop=(48, 40), training=True)
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, found = data[0]
        assert image.shape == (3, 48, 40)
        assert found.shape == (48, 40)
        known = found != 255
        sizes.add(int(known.sum()))
        right = (image[0] * 255 / 60).round() == found
        assert right[known].float().mean() > 0.85  # all but the pixels between two fields
        assert (image[:, ~known] == 0).all()
    assert len(sizes) > 2


def test_validation_is_at_the_masks_own_size(folder: Path) -> None:
    sets = Segmentation().open(pixels(), folder, None, seed=0)
    sets = Segmentation().prepared(sets, Preprocess(size=16), "auto")
    image, mask = sets.validation[0]
    assert image.shape == (3, 16, 16)
    assert mask.shape == (32, 32)
    assert sets.train[0][0].shape == (3, 16, 16)


def test_a_tenth_is_held_back_where_there_is_no_validation(folder: Path) -> None:
    sets = Segmentation().open(pixels(), folder / "train", None, seed=0)
    assert (len(sets.train), len(sets.validation), sets.count) == (7, 1, 4)
    assert "held back" in sets.note


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_new_heads_have_the_shapes_that_torchvision_gives_them(name: str) -> None:
    def built(classes: int) -> nn.Module:
        more = {} if name.startswith("lraspp") else {"aux_loss": True}
        with torch.device("meta"):
            model: nn.Module = getattr(zoo, name)(
                weights=None, weights_backbone=None, num_classes=classes, **more
            )  # fmt: skip
        return model

    model = built(21)
    assert find_predictor(model) == ("", 21)
    resize_head(model, Head("", 3))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in built(3).state_dict().items()}


def test_a_new_head_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    train(pixels(9), folder, output=tmp_path / "run")
    again = normswap.load(tmp_path / "run" / "last.safetensors", model=pixels(9))
    assert again(torch.zeros(1, 3, 32, 32))["out"].shape[1] == 4
    assert again(torch.zeros(1, 3, 32, 32))["aux"].shape[1] == 4


def test_an_unreadable_image_is_named_and_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    bad = sorted((tmp_path / "data" / "train" / "images").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:60])
    report = train(pixels(), tmp_path / "data", epochs=1, steps=None)
    assert len(report.bad) == 1
    assert bad.name in report.bad[0]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.rand(3, 8, 8), torch.zeros(8, 8)), "class numbers"),
        ((torch.rand(3, 8, 8), torch.zeros(8, 9).long()), "its mask"),
        ((torch.rand(3, 8, 8), torch.full((8, 8), 4)), "knows 0 to 3"),
        ((torch.rand(3, 8, 8), 1), "image, mask"),
    ],
)
def test_wrong_samples_are_named(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(pixels(), [sample, sample])


def test_what_gives_no_scores_for_pixels_is_refused(folder: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(OptionError, match="segmentation network gives scores"):
        train(model, folder)
    with pytest.raises(OptionError, match="distil"):
        train(pixels(), folder, distil=0.5)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("size", [20, 48])
def test_images_of_another_size_than_their_masks_are_validated(folder: Path, tmp_path: Path, size: int) -> None:
    report = train(pixels(), folder, preprocess=Preprocess(size=size, resize=size), output=tmp_path / "run")
    assert report.steps == 2
    assert 0 <= report.figures["val_miou"] <= 1


def test_masks_of_several_sizes_are_validated_together() -> None:
    images = [torch.randn(3, 16, 16), torch.randn(3, 16, 16)]
    masks = [torch.zeros(16, 16).long(), torch.zeros(32, 24).long()]
    meter = Overlap()
    with torch.no_grad():
        meter.add(pixels(), (images, masks))
    assert meter.result(lambda value: value)["val_pixel_accuracy"] <= 1


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_images_with_any_number_of_channels_are_drawn(tmp_path: Path, channels: int) -> None:
    model = nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, 4, 3, padding=1))
    data = [(torch.randn(channels, 8, 8), torch.randint(0, 4, (8, 8))) for _ in range(4)]
    assert train(model, data, data, output=tmp_path / "run").examples.is_file()


def test_classes_that_a_network_of_ones_own_does_not_know_are_told_of() -> None:
    data = [(torch.randn(3, 8, 8), torch.full((8, 8), 5))] * 4
    with pytest.raises(DataError, match="the network knows 0 to 2"):
        train(nn.Conv2d(3, 3, 1), data)
