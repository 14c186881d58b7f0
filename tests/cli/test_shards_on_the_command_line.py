"""Shards in, shards out, and every command takes them as it takes one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def sharded_weights(nets: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of nets.py:tiny, a tensor a shard, in folder/w."""
    torch.manual_seed(4)
    state = nets.tiny().state_dict()
    (folder / "w").mkdir()
    places = {}
    for i, (name, tensor) in enumerate(state.items(), 1):
        places[name] = f"model-{i:05}-of-{len(state):05}.safetensors"
        save_file({name: tensor}, folder / "w" / places[name])
    (folder / "w" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def converted(cli: Cli, nets: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Shards of the network in GroupNorm, in folder/out; gives the weights that it was made from."""
    state = sharded_weights(nets, folder)
    ran = cli("convert", "nets.py:tiny", "--weights", "w", "--to", "gn", "--max-shard-size", "1KB", "-o", "out")
    assert ran.code == 0, ran.err
    return state


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("file", ["out", f"out/{INDEX}"])
def test_commands_take_shards_like_one_file(cli: Cli, file: str) -> None:
    for command in (["inspect"], ["verify"], ["convert", "--to", "original", "-o", f"{len(file)}.safetensors"]):
        ran = cli(command[0], file, *command[1:], "--trust-code")
        assert ran.code == 0, ran.err


def test_shards_are_undone_into_shards(cli: Cli, folder: Path, converted: dict[str, torch.Tensor]) -> None:
    ran = cli("convert", "out", "--to", "original", "--trust-code", "--max-shard-size", "1KB", "-o", "back")
    assert ran.code == 0, ran.err
    found = tensors_in(folder / "back")
    assert found.keys() == converted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in converted.items())


def test_it_is_told_how_many_files_shards_are_and_how_large(cli: Cli, folder: Path) -> None:
    call = ("convert", "nets.py:tiny", "--to", "gn", "--groups", "2", "--max-shard-size", "1KB", "--force", "-o", "out")
    shown = cli(*call)
    shards, everything = list((folder / "out").glob("*.safetensors")), list((folder / "out").iterdir())
    assert len(everything) == len(shards) + 1 > 2
    total = sum(file.stat().st_size for file in everything)
    assert f"Written: out, {len(shards)} files and an index, {total / 1024:.1f} KiB in all" in shown.out
    told = json.loads(cli(*call, "--json").out)
    assert (told["files"], told["bytes"]) == (len(shards), total)


@pytest.mark.usefixtures("converted")
def test_a_card_is_refused_for_shards_with_a_way_out(cli: Cli) -> None:
    ran = cli("card", "out", "--license", "mit")
    assert ran.code == 1
    assert "is in shards, and a card goes with one file" in " ".join(ran.err.split())


@pytest.mark.usefixtures("converted")
def test_shards_are_calibrated(cli: Cli, images: Path, folder: Path) -> None:
    ran = cli("calibrate", "out", "--data", images, "--size", "16", "--mean", "0", "--std", "1", "--trust-code")
    assert ran.code == 0, ran.err
    assert (folder / "out-calibrated.safetensors").is_file()


@pytest.mark.usefixtures("converted", "images")
@pytest.mark.parametrize(
    ("file", "name"), [("out", "out"), (f"out/{INDEX}", "out"), ("out.v2/", "out.v2"), (INDEX, "."), (".", ".")]
)
def test_results_of_shards_are_named_after_their_folder(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    (folder / "out").rename(folder / "out.v2") if "v2" in file else None
    if name == ".":
        monkeypatch.chdir("out")
        name = "out"
    more = ("--trust-code", "--source", str(folder / "nets.py:tiny"))
    prepared = ("--data", str(folder / "photos"), "--size", "16", "--mean", "0", "--std", "1")
    for command, written in (
        (("calibrate", *prepared), f"{name}-calibrated.safetensors"),
        (("export", "--to", "torchscript", "--input", "1,3,16,16"), f"{name}.pt"),
        (("distil", *prepared, "--steps", "1", "--batch-size", "2"), f"{name}-distilled.safetensors"),
    ):
        ran = cli(command[0], file, *command[1:], *more, "--json")
        assert ran.code == 0, ran.err
        assert Path(written).is_file()


@pytest.mark.usefixtures("converted")
def test_shards_that_are_read_are_never_replaced(cli: Cli) -> None:
    again = ("convert", "nets.py:tiny", "--to", "gn", "--max-shard-size", "1KB", "--force")
    ran = cli(*again, "--weights", f"w/{INDEX}", "-o", "w")
    assert ran.code == 1
    assert "is read by the same command" in ran.err


@pytest.mark.parametrize("size", ["big", "3", "2 XB"])
def test_a_size_that_is_none_is_an_error_of_the_call(cli: Cli, size: str) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--max-shard-size", size)
    assert ran.code == 2
    assert "no size such as 500MB, 2GB or 2GiB" in " ".join(ran.err.split())


def test_a_missing_shard_is_named(cli: Cli, nets: Any, folder: Path) -> None:
    sharded_weights(nets, folder)
    gone = sorted((folder / "w").glob("*.safetensors"))[2]
    gone.unlink()
    ran = cli("convert", "nets.py:tiny", "--weights", "w", "--to", "gn")
    assert ran.code == 1
    assert gone.name in ran.err


def test_plain_shards_as_a_source_are_told_to_need_an_architecture(cli: Cli, nets: Any, folder: Path) -> None:
    sharded_weights(nets, folder)
    ran = cli("convert", "w", "--to", "gn")
    assert ran.code == 1
    assert "--weights w" in " ".join(ran.err.split())
