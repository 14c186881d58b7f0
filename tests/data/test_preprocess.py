"""Preprocess: against torchvision's, timm's and transformers' own transforms, and hand-made pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data.preprocess import Preprocess, canonical, eight_bit
from normswap.errors import OptionError


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels(picture: Image.Image) -> torch.Tensor:
    """(C, H, W) float64, the values as PIL gives them."""
    values = np.asarray(picture).astype(np.float64)
    return torch.from_numpy(values.transpose(2, 0, 1) if values.ndim == 3 else values[None])


@pytest.mark.parametrize(("width", "height"), [(300, 260), (231, 400), (224, 224), (640, 97)])
def test_equals_torchvisions_classification_preset(width: int, height: int) -> None:
    from torchvision.models import ResNet50_Weights

    preset = ResNet50_Weights.DEFAULT.transforms()
    ours = Preprocess.of(preset)
    assert ours is not None
    picture = noise(width, height)
    torch.testing.assert_close(ours(picture), preset(picture), rtol=0, atol=1e-6)


def test_equals_torchvisions_segmentation_and_detection_presets() -> None:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    picture = noise(120, 90)
    for preset in (FCN_ResNet50_Weights.DEFAULT.transforms(), FasterRCNN_ResNet50_FPN_Weights.DEFAULT.transforms()):
        ours = Preprocess.of(preset)
        assert ours is not None
        torch.testing.assert_close(ours(picture), preset(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"crop_pct": 0.95, "interpolation": "bicubic"}, {"crop_mode": "squash", "input_size": (3, 160, 192)},
     {"crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}],
)  # fmt: skip
def test_equals_timms_transform(changes: dict[str, Any]) -> None:
    timm_data = pytest.importorskip("timm.data")
    config = {"input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
    config |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **changes}
    theirs = timm_data.create_transform(**config)
    ours = Preprocess.of(config)
    assert ours is not None
    picture = noise(330, 250)
    torch.testing.assert_close(ours(picture), theirs(picture), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("ViTImageProcessor", {"size": {"height": 96, "width": 80}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": {"height": 80, "width": 80}}),
    ],
)
def test_equals_transformers_image_processors(processor: str, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, processor)(**settings)
    ours = Preprocess.of(json.loads(theirs.to_json_string()))
    assert ours is not None
    picture = noise(400, 300)
    expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert ours(picture).shape == expected.shape
    # Its resize of a tensor rounds to 8 bits differently from PIL's of a picture: one step of 255, over the std.
    torch.testing.assert_close(ours(picture), expected, rtol=0, atol=2 / 255 / 0.22)


def test_what_it_cannot_say_is_left_to_the_callable() -> None:
    from torchvision.models.video import R3D_18_Weights

    assert Preprocess.of(R3D_18_Weights.DEFAULT.transforms()) is None
    assert Preprocess.of({"image_mean": [0.5] * 3, "size": {"shortest_edge": 800, "longest_edge": 1333}}) is None
    assert Preprocess.of({"input_size": (3, 224, 224), "crop_mode": "border"}) is None
    assert Preprocess.of({}) is None
    assert Preprocess.of(lambda picture: picture) is None


def test_small_pictures_keep_their_size_and_large_ones_become_224() -> None:
    assert Preprocess()(noise(32, 32)).shape == (3, 32, 32)
    assert Preprocess()(noise(64, 40)).shape == (3, 40, 64)
    assert Preprocess()(noise(65, 40)).shape == (3, 224, 224)
    assert Preprocess(size="native")(noise(300, 200)).shape == (3, 200, 300)


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    for size in (32, 224):
        picture = noise(size, size)
        expected = (pixels(picture) / 255 - 0.25) / 0.5
        out = Preprocess(size=size, mean=(0.25,), std=(0.5,))(picture)
        torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-6)


def test_default_normalisation_is_imagenets() -> None:
    out = Preprocess()(Image.new("RGB", (8, 8), (255, 0, 51)))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(out[:, 0, 0], torch.tensor(expected))


def test_a_size_that_is_not_square_takes_the_whole_picture() -> None:
    picture = Image.new("L", (200, 40))
    picture.paste(255, (100, 0, 200, 40))
    out = Preprocess(size=(32, 100), mean=(0.0,), std=(1.0,))(picture)
    assert out.shape == (3, 32, 100)
    assert out[:, :, :45].max() == 0
    assert out[:, :, 55:].min() == 1


def test_one_channel_is_luminance_with_averaged_constants() -> None:
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    out = Preprocess(channels=1)(picture)
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    expected = (luma - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
    assert out.shape == (1, 8, 8)
    assert out[0, 0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_grey_of_16_bits_keeps_its_depth() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 3 + 20000
    out = Preprocess.raw()(Image.fromarray(values))
    expected = torch.from_numpy(values.astype(np.float64) / 65535).float().expand(3, -1, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7)
    assert out.unique().numel() == 64


def test_resizing_16_bits_stays_within_black_and_white() -> None:
    values = np.zeros((80, 80), dtype=np.uint16)
    values[:, 40:] = 65535
    out = Preprocess(size=48, interpolation="bicubic", mean=(0.0,), std=(1.0,))(Image.fromarray(values))
    assert (out.min().item(), out.max().item()) == (0, 1)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_what_pil_calls_rgb(mode: str) -> None:
    picture = noise(16, 16, mode if mode not in ("LA", "HSV") else "RGB").convert(mode)
    out = Preprocess.raw()(picture)
    torch.testing.assert_close(out, (pixels(picture.convert("RGB")) / 255).float())


def test_transparency_of_a_palette_is_dropped_without_a_warning() -> None:
    picture = noise(16, 16).quantize(8)
    expected = pixels(picture.convert("RGB"))
    picture.info["transparency"] = bytes(range(8))
    torch.testing.assert_close(Preprocess.raw()(picture), (expected / 255).float())


def test_floats_are_taken_from_0_to_1_and_nowhere_else() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    torch.testing.assert_close(Preprocess.raw()(Image.fromarray(values))[0], torch.from_numpy(values))
    for bad in (values * 300, values - 1, values * np.nan):
        with pytest.raises(ValueError, match="black and white"):
            canonical(Image.fromarray(bad))


def test_other_libraries_get_8_bits_of_rgb() -> None:
    values = np.array([[0, 257 * 7], [257 * 128, 65535]], dtype=np.uint16)
    out = eight_bit(Image.fromarray(values))
    assert out.mode == "RGB"
    assert np.asarray(out)[..., 0].tolist() == [[0, 7], [128, 255]]


def test_survives_json() -> None:
    for given in (Preprocess(), Preprocess(size=(32, 100), resize=(40, 120)), Preprocess.raw(channels=1)):
        assert Preprocess(**json.loads(json.dumps(given.to_dict()))) == given


@pytest.mark.parametrize(
    "bad",
    [{"size": 0}, {"size": "small"}, {"size": (1, 2, 3)}, {"size": 2.5}, {"resize": -1}, {"std": (0.0, 1.0, 1.0)},
     {"mean": (1.0, 2.0)}, {"mean": (float("nan"),)}, {"channels": 2}, {"interpolation": "cubic"}],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=name):
        Preprocess(**bad)
