"""What `data=` accepts, and in which form it comes out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from normswap.data import open_images, shapes
from normswap.data.batches import as_batches, placed
from normswap.data.one_batch import images_in
from normswap.errors import DataError, OptionError

X = torch.randn(10, 3, 5, 5)
Y = torch.arange(10)


def inputs(data: Any, **options: Any) -> list[Any]:
    """The first argument of each batch, after checking that a second pass gives as many."""
    batches = as_batches(data, **options)
    first = [args[0] for args, _ in batches]
    assert len(first) == sum(1 for _ in batches)
    return first


def labels(data: Any) -> list[Any]:
    return [None if y is None else y.tolist() for _, y in as_batches(data)]


def test_a_tensor_is_cut_into_batches() -> None:
    parts = inputs(X, batch_size=4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts), X)


def test_a_dataset_is_cut_into_batches_with_its_labels() -> None:
    batches = list(as_batches(TensorDataset(X, Y), batch_size=4))
    assert [len(args[0]) for args, _ in batches] == [4, 4, 2]
    assert torch.cat([y for _, y in batches if y is not None]).tolist() == Y.tolist()


def test_a_dataset_of_images_with_boxes_gives_lists_of_images() -> None:
    batches = list(as_batches(shapes(5, size=32), batch_size=2))
    assert [len(args[0]) for args, _ in batches] == [2, 2, 1]
    assert all(isinstance(args[0], list) and labels is None for args, labels in batches)
    assert torch.equal(batches[1][0][0][1], shapes(5, size=32)[3][0])


def test_a_loader_keeps_its_batches() -> None:
    assert [len(part) for part in inputs(DataLoader(TensorDataset(X), batch_size=7), batch_size=2)] == [7, 3]


@pytest.mark.parametrize(
    "batch",
    [X, [X], (X,), (X, Y), [X, Y], (X, None), {"pixel_values": X}, {"image": X, "label": Y}, {"x": X, "other": 1},
     ({"pixel_values": X}, Y), ((X,), Y)],
)  # fmt: skip
def test_every_form_of_batch_gives_its_images(batch: Any) -> None:
    (args, _), *rest = list(as_batches([batch]))
    assert not rest
    assert len(args) == 1
    assert args[0] is X


def test_one_dict_is_one_batch() -> None:
    assert labels({"pixel_values": X, "labels": Y}) == [Y.tolist()]


@pytest.mark.parametrize("y", [Y, Y.int(), Y.to(torch.uint8), Y.tolist(), tuple(Y.tolist())])
def test_labels_are_one_whole_number_for_each_image(y: Any) -> None:
    ((_, out),) = as_batches([(X, y)])
    assert out is not None
    assert out.dtype == torch.int64
    assert out.tolist() == Y.tolist()


@pytest.mark.parametrize(
    "y", [Y.float(), Y[:5], Y > 3, torch.zeros(10, 4, dtype=torch.long), [{"boxes": 1}] * 10, "no"]
)
def test_other_targets_are_no_labels(y: Any) -> None:
    assert labels([(X, y)]) == [None]


def test_lists_of_images_are_for_detectors() -> None:
    images = [torch.rand(3, 8, 9), torch.rand(3, 10, 7)]
    for batch in (images, tuple(images), (images, [{}, {}]), (tuple(images), ({}, {}))):
        ((args, out),) = as_batches([batch])
        assert len(args) == 1
        assert isinstance(args[0], list)
        assert all(a is b for a, b in zip(args[0], images, strict=True))
        assert out is None
        assert images_in(args) == 2


def test_two_inputs_come_as_a_tuple() -> None:
    ((args, y),) = as_batches([((X, X + 1), Y)])
    assert [tuple(a.shape) for a in args] == [tuple(X.shape)] * 2
    assert y is not None


def test_a_generator_is_read_into_memory_unless_it_is_needed_once() -> None:
    def batches() -> Iterator[Tensor]:
        yield from X.split(5)

    assert len(inputs(batches())) == 2
    streamed = as_batches(batches(), once=True)
    assert len(list(streamed)) == 2
    with pytest.raises(DataError, match="no image\nA generator can be read only once"):
        list(streamed)


def test_once_takes_one_batch_at_a_time() -> None:
    given: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            given.append(i)
            yield X

    next(iter(as_batches(batches(), once=True)))
    assert given == [0]


def test_a_folder_is_read_with_the_default_preprocessing(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(tmp_path / name / "0.png")
    for data in (tmp_path, str(tmp_path), open_images(tmp_path), open_images(tmp_path).batches()):
        batches = as_batches(data)
        ((args, y),) = batches
        torch.testing.assert_close(args[0][:, 0], torch.full((2, 32, 32), -0.485 / 0.229))
        assert y is not None
        assert y.tolist() == [0, 1]
        assert batches.classes == ("cat", "dog")
        assert as_batches(batches) is batches


def test_class_names_of_torchvisions_folder_are_known(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import to_tensor

    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "0.png")
    folder = ImageFolder(tmp_path, transform=to_tensor)
    assert as_batches(folder).classes == as_batches(DataLoader(folder)).classes == ("cat",)


@pytest.mark.parametrize("data", [[], X[:0], [X[:0]], iter(())])
def test_no_image_at_all_is_an_error(data: Any) -> None:
    with pytest.raises(DataError, match="no image"):
        list(as_batches(data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (None, "data is of type NoneType"),
        (3, "data is of type int"),
        (torch.tensor(1.0), "a single number"),
        (["a", "b"], "a batch of data is of type str"),
        ([(X, Y, Y)], r"a batch of data is a tuple of 3 \(Tensor, Tensor, Tensor\)"),
        ([{"speed": X}], "the keys 'speed', none of which"),
        ([(3, Y)], "the input in a batch of data is of type int"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "uint8"),
        ([[torch.zeros(3, 4, 4, dtype=torch.uint8)]], "uint8"),
    ],
)
def test_anything_else_is_refused(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        list(as_batches(data))
    assert caught.value.__str__().count("\n") == 1  # a hint follows


@pytest.mark.parametrize("bad", [0, -4, 1.5, True])
def test_a_batch_holds_at_least_one_image(bad: Any) -> None:
    with pytest.raises(OptionError, match="batch_size"):
        as_batches(X, bad)


def test_placed_casts_floats_alone_and_keeps_the_structure() -> None:
    args = placed(([X, X], Y, "text"), torch.device("cpu"), torch.float64)
    assert [t.dtype for t in args[0]] == [torch.float64] * 2
    assert args[1].dtype == torch.int64
    assert (type(args), type(args[0]), args[2]) == (tuple, list, "text")


def test_importing_it_imports_no_image_library() -> None:
    code = "import sys, normswap.data; sys.exit(any(m in sys.modules for m in ('torchvision', 'PIL', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_no_image_can_be_read_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("hi")
    with pytest.raises(DataError, match=r"none of the images could be read; the first: .*x\.jpg"):
        list(as_batches(tmp_path, max_bad=10))
