"""Weights in shards, and those of torch.distributed.checkpoint: read like one file, and refused where damaged."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from normswap.errors import WeightsError
from normswap.sources.resolve import build, parse
from normswap.sources.weights import read_state


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def sharded(folder: Path, state: dict[str, Tensor], *, pickled: bool = False, wrap: Any = None) -> Path:
    """Two shards and an index, in the layout of Hugging Face; returns the index."""
    folder.mkdir(exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = list(state)
    places = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = folder / f"{stem}-{i:05}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        if pickled:
            torch.save(tensors, file)
        else:
            save_file(tensors, file)
        places |= dict.fromkeys(part, file.name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def distributed(folder: Path, saved: Any) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return folder


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(state[k].dtype == v.dtype and torch.equal(state[k], v) for k, v in expected.items())


def failure(path: Path) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        read_state(path)
    return caught.value


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("named", ["index", "folder"])
def test_shards_are_read_by_their_index_or_its_folder(tmp_path: Path, pickled: bool, named: str) -> None:
    index = sharded(tmp_path / "w", net().state_dict(), pickled=pickled)
    assert_same(read_state(index if named == "index" else index.parent), net().state_dict())


def test_prefixes_are_dropped_from_names_in_shards(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in net().state_dict().items()}
    assert_same(read_state(sharded(tmp_path / "w", state)), net().state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_one_whole_file_is_read(tmp_path: Path, name: str) -> None:
    (save_file if name.endswith("tensors") else torch.save)(net().state_dict(), tmp_path / name)
    assert_same(read_state(tmp_path), net().state_dict())


def test_a_network_is_built_with_weights_in_shards(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))\n"
    )
    index = sharded(tmp_path / "w", net().state_dict())
    model, _ = build(parse(f"{tmp_path / 'nets.py'}:make"), str(index.parent))
    assert_same(model.state_dict(), net().state_dict())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", net().state_dict())
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    message = failure(index).message
    assert "names 2 shards, of which 1 are missing" in message
    assert "model-00002-of-00002.safetensors" in message


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", net().state_dict())
    said = json.loads(index.read_text())
    said["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(said))
    message = failure(index).message
    assert "model-00001-of-00002.safetensors lacks 1 of 4 tensors" in message
    assert message.endswith("extra.weight")


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_shard_that_is_cut_off_is_named(tmp_path: Path, pickled: bool) -> None:
    index = sharded(tmp_path / "w", net().state_dict(), pickled=pickled)
    shard = next(file for file in index.parent.iterdir() if "00002-of" in file.name)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in failure(index).message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_told(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert index.name in failure(index).message


@pytest.mark.parametrize("file", ["../model-00001-of-00002.safetensors", "/etc/passwd", ""])
def test_an_index_reaches_no_file_outside_of_its_folder(tmp_path: Path, file: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    assert "which is not a file beside it" in failure(index).message


def test_a_folder_without_weights_is_told_what_one_would_hold(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert "is a folder, not a checkpoint file" in error.message
    assert error.hint is not None
    assert "*.index.json" in error.hint


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def test_a_distributed_checkpoint_is_read(tmp_path: Path) -> None:
    assert_same(read_state(distributed(tmp_path / "d", net().state_dict())), net().state_dict())


def test_of_a_distributed_training_state_only_the_network_is_read(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}
    assert_same(read_state(distributed(tmp_path / "d", saved)), state)


def test_a_distributed_checkpoint_without_metadata_is_told(tmp_path: Path) -> None:
    (distributed(tmp_path / "d", net().state_dict()) / ".metadata").unlink()
    assert "has no .metadata" in failure(tmp_path / "d").message


def test_damaged_metadata_is_told(tmp_path: Path) -> None:
    file = distributed(tmp_path / "d", net().state_dict()) / ".metadata"
    file.write_bytes(file.read_bytes()[:100])
    assert ".metadata cannot be read" in failure(tmp_path / "d").message


@pytest.mark.parametrize("cut", [0, 200])
def test_a_damaged_part_of_a_distributed_checkpoint_is_told(tmp_path: Path, cut: int) -> None:
    part = next(distributed(tmp_path / "d", net().state_dict()).glob("*.distcp"))
    if cut:
        part.write_bytes(part.read_bytes()[:cut])
    else:
        part.unlink()
    assert "is damaged, or not all of its files are there" in failure(tmp_path / "d").message


def test_code_in_metadata_is_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    file = distributed(tmp_path / "d", net().state_dict()) / ".metadata"
    file.write_bytes(pickle.dumps(Payload()))
    assert "which is no description of tensors" in failure(tmp_path / "d").message
    assert not (tmp_path / "run").exists()
