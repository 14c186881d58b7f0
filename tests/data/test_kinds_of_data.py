"""verify, calibrate, distil and finetune take the same data, prepared alike, and leave out what cannot be read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.data import Preprocess
from normswap.errors import DataError, OptionError

X, Y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2)).eval()


def verify(data: Any, **options: Any) -> Any:
    model = net()
    return normswap.verify(model, copy.deepcopy(model), data, batch_size=4, **options)


def calibrate(data: Any, **options: Any) -> Any:
    model = net()
    return normswap.calibrate(normswap.convert(model, to="gn", groups=2), model, data, batch_size=4, **options)


def distil(data: Any, **options: Any) -> Any:
    model = net()
    return normswap.distil(normswap.convert(model, to="gn", groups=2), model, data, batch_size=4, steps=2, **options)


def finetune(data: Any, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    return normswap.finetune(net(), data, (X, Y), batch_size=4, steps=2, device="cpu", freeze_stats=True, **options)


KINDS = {
    "pair": lambda: (X, Y),
    "dataset": lambda: TensorDataset(X, Y),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "batches": lambda: [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
    "generator": lambda: ((X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", [verify, calibrate, distil, finetune])
def test_every_function_takes_every_kind_of_data(work: Callable[..., Any], kind: str) -> None:
    assert work(KINDS[kind]()) is not None


def test_a_pair_is_read_as_images_and_labels() -> None:
    assert verify((X, Y)).labelled == 12
    assert calibrate((X, Y)).images == 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        place = tmp_path / "photos" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 10, 30)).save(place / f"{i:02}.png")
    (tmp_path / "photos" / "a" / "04.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize("work", [verify, calibrate, distil])
def test_images_that_cannot_be_read_are_left_out_and_named(work: Callable[..., Any], folder: Path) -> None:
    report = work(folder)
    assert [name.partition(":")[0] for name in report.bad] == ["a/04.png"]
    with pytest.raises(DataError, match=r"1 of \d+ images"):
        work(folder, max_bad=0)


def test_a_folder_is_prepared_as_asked(folder: Path) -> None:
    plain = verify(folder, preprocess=Preprocess(size=8, mean=(0.0,), std=(1.0,)))
    assert plain.images == 11
    with pytest.raises(DataError):
        verify(folder, preprocess=Preprocess(size=9))


@pytest.mark.parametrize(
    "call",
    [
        lambda: normswap.verify("resnet18", net()),
        lambda: normswap.calibrate("x.safetensors", data=X),
        lambda: normswap.distil("x.safetensors", data=X),
        lambda: normswap.finetune("x.safetensors", (X, Y)),
        lambda: normswap.save("x.safetensors", "y.safetensors"),
        lambda: normswap.revert("x.safetensors"),
        lambda: normswap.inspect("resnet18"),
        lambda: normswap.plan("resnet18", "gn"),
        lambda: normswap.convert("resnet18", "gn"),
        lambda: normswap.freeze("resnet18"),
    ],
)
def test_a_name_in_the_place_of_a_network_is_an_option_error(call: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module, got str"):
        call()
