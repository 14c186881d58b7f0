"""Converted networks in shards: the layout of Hugging Face, whole or not at all, read back and undone like one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import small
from safetensors.torch import load_file
from torch import Tensor, nn

import normswap
from normswap.checkpoint.saving import save_state
from normswap.errors import CheckpointError, OptionError, OutputError
from normswap.files.folders import reserved_folder
from normswap.files.sharding import parse_size

INDEX = "model.safetensors.index.json"


def shards(folder: Path, model: nn.Module | None = None, size: int | str = 1000, **kwargs: Any) -> Path:
    model = normswap.convert(small(), "gn", check=False) if model is None else model
    return normswap.save(model, folder / "s", max_shard_size=size, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500MB", 500_000_000),
        ("2GB", 2 * 10**9),
        ("2GiB", 2 << 30),
        ("1.5 kb", 1500),
        ("7", 7),
        (7, 7),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2 files", "-1", "0", 0, "0.1B", True, "1e9"])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="needs a size such as 500MB"):
        parse_size(text)


def test_shards_have_the_layout_of_hugging_face(tmp_path: Path) -> None:
    """Each name once, in the file that the index says, none larger than asked for but of one tensor."""
    folder = shards(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    count = len(files)
    assert count > 2
    assert sorted(files) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in files.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 1000 or len(tensors) == 1 for size, tensors in zip(sizes, files.values(), strict=True))


def test_shards_are_read_by_transformers_own_reader(tmp_path: Path) -> None:
    """The library that made the layout finds the same names in the same files."""
    hub = pytest.importorskip("transformers.utils.hub", reason="transformers is not installed")
    folder = shards(tmp_path)
    files, said = hub.get_checkpoint_shard_files(str(folder), str(folder / INDEX))
    assert set(said["all_checkpoint_keys"]) == {name for file in files for name in load_file(file)}


@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_network_in_shards_is_loaded_and_undone_bit_for_bit(tmp_path: Path, named: str) -> None:
    original = small()
    converted = normswap.convert(original, "gn", check=False)
    folder = shards(tmp_path, converted)
    loaded = normswap.load(folder if named == "folder" else folder / INDEX, small())
    assert same(loaded, converted)
    assert same(normswap.revert(loaded), original)


def test_tied_tensors_come_back_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a = small(), nn.Conv2d(8, 8, 1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.body(x)))

    loaded = normswap.load(shards(tmp_path, normswap.convert(Tied(), "gn", check=False)), Tied())
    assert loaded.a.weight is loaded.b.weight


def test_the_state_of_any_network_goes_into_shards(tmp_path: Path) -> None:
    model = small()
    folder = save_state(model, tmp_path / "plain", max_shard_size=500)
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert "normswap" not in json.loads((folder / INDEX).read_text())["metadata"]


def test_an_edited_manifest_in_an_index_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path) / INDEX
    index.write_text(index.read_text().replace('\\"gn\\"', '\\"ln\\"'))
    with pytest.raises(CheckpointError, match="was edited after normswap wrote it"):
        normswap.load(index, small())


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_is_named_when_it_is_loaded(tmp_path: Path, damage: str) -> None:
    shard = sorted(shards(tmp_path).glob("*.safetensors"))[1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        normswap.load(shard.parent, small())


# --- where to ------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    real, calls = os.fsync, []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        shards(tmp_path, overwrite=True, size=700)
    assert names(tmp_path) == ["s"]
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_shards_are_replaced_as_a_whole(tmp_path: Path) -> None:
    many = len(names(shards(tmp_path, size=300)))
    folder = shards(tmp_path, size="1MB", overwrite=True)
    assert many > 2
    assert names(folder) == ["model-00001-of-00001.safetensors", INDEX]
    assert names(tmp_path) == ["s"]


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ("s.safetensors", "is the name of a file, and shards go into a folder"),
        ("mine", "holds notes.txt, and only a folder of shards alone is replaced"),
        ("file", "is not a folder"),
        ("no/s", "does not exist"),
    ],
)
def test_nothing_but_shards_is_replaced(tmp_path: Path, made: str, match: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=match):
        normswap.save(
            normswap.convert(small(), "gn", check=False), tmp_path / made, max_shard_size="1MB", overwrite=True
        )
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_folder_of_shards_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        shards(tmp_path)


def test_what_came_into_the_folder_during_the_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion may take hours, and its folder need not stay empty."""
    real = os.fsync

    def meanwhile(handle: int) -> None:
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "notes.txt").write_text("mine")
        real(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        shards(tmp_path)
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["s"]


@pytest.mark.parametrize("named", [".", "../s"])
def test_the_folder_in_which_one_works_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """It would be gone from under the process, with what relative names lead to."""
    before = {file.name: file.read_bytes() for file in shards(tmp_path).iterdir()}
    monkeypatch.chdir(tmp_path / "s")
    with pytest.raises(OutputError, match="is the current folder, which cannot be replaced as a whole"):
        normswap.save(normswap.convert(small(), "gn", check=False), named, max_shard_size="1KB", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before


def test_a_mount_point_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "s")  # mounting takes root
    with (
        pytest.raises(OutputError, match="is a mount point, which cannot be replaced as a whole"),
        reserved_folder(tmp_path / "s", overwrite=True),
    ):
        pytest.fail("the work has begun")


def test_a_folder_of_links_to_shards_that_are_read_is_not_replaced(tmp_path: Path) -> None:
    """So lie snapshots in Hugging Face's cache: the files are elsewhere, and named by their digests."""
    folder = shards(tmp_path)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    with (
        pytest.raises(OutputError, match="never writes over what it reads"),
        reserved_folder(folder, overwrite=True, inputs=[folder / INDEX]),
    ):
        pytest.fail("the work has begun")
