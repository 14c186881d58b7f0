"""Every command says which weights it used, and no network is compared with weights it was not made from."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import normswap
from normswap.checkpoint.manifest import read_manifest

CONVERT = ("--to", "gn", "--groups", 2)


def digest(file: str) -> str:
    """That of the original in the manifest."""
    return read_manifest(file)["source"]["weights"]["digest"]


def test_a_factory_that_leaves_its_network_random_is_warned_of(cli: Cli) -> None:
    ran = cli("convert", "nets.py:fresh", *CONVERT)
    assert "Weights: random: the factory's own" in ran.out
    assert "note: nets.py:fresh has random weights, its factory's own; --weights FILE gives it trained ones" in ran.err
    used = cli("convert", "nets.py:fresh", *CONVERT, "--force", "--json").json["network"]["weights"]
    assert (used["name"], used["random"], used["given"]) == ("random: the factory's own", True, None)


def test_a_factory_that_trains_its_network_is_not_called_random(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", *CONVERT)
    assert "Weights: the factory's own\n" in ran.out
    assert "random weights" not in ran.err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_checkpoint_of_another_dtype_is_told(cli: Cli, nets: Any, dtype: str) -> None:
    torch.save(nets.tiny(seed=5).to(getattr(torch, dtype)).state_dict(), "mine.pth")
    ran = cli("convert", "nets.py:tiny", "--weights", "mine.pth", *CONVERT, "--json")
    cast = None if dtype == "float32" else f"{dtype} to float32"
    assert (f"note: mine.pth is cast from {cast}: the network keeps" in ran.err) is (cast is not None)
    assert ran.json["network"]["weights"]["cast"] == cast
    with safe_open("tiny-gn.safetensors", "pt") as file:
        held = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {each for each in held if each.is_floating_point} == {torch.float32}


def test_a_checkpoint_is_named_and_goes_into_the_manifest(cli: Cli, nets: Any) -> None:
    torch.save(nets.tiny(seed=5).state_dict(), "mine.pth")
    ran = cli("convert", "nets.py:tiny", "--weights", "mine.pth", *CONVERT)
    assert "Weights: mine.pth" in ran.out
    kept = read_manifest("tiny-gn.safetensors")["source"]["weights"]
    assert (kept["name"], kept["given"], kept["random"]) == ("mine.pth", "mine.pth", False)
    torch.save({"state_dict": nets.tiny(seed=5).state_dict()}, "same.pth")
    torch.save(nets.tiny(seed=6).state_dict(), "other.pth")
    for name, equal in (("same.pth", True), ("other.pth", False)):
        cli("convert", "nets.py:tiny", "--weights", name, *CONVERT, "-o", "again.safetensors", "--force")
        assert (digest("again.safetensors") == kept["digest"]) is equal


def test_weights_that_were_asked_to_be_random_are_warned_of(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--weights", "none", *CONVERT)
    assert "Weights: random\n" in ran.out
    assert "note: nets.py:tiny has random weights\n" in ran.err


def test_a_network_without_statistics_is_random_if_another_seed_changes_it(cli: Cli, folder: Path) -> None:
    text = "from torch import nn\nimport torch\n\ndef plain():\n"
    text += "    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))\n"
    text += "\ndef fixed():\n    torch.manual_seed(0)\n    return plain()\n"
    (folder / "groups.py").write_text(text)
    for name, random in (("plain", True), ("fixed", False)):
        ran = cli("convert", f"groups.py:{name}", "--to", "ln", "--from", "gn", "--json")
        assert ran.json["network"]["weights"]["random"] is random


def test_a_file_of_half_precision_says_how_to_get_one_that_trains(cli: Cli, images: Path, folder: Path) -> None:
    (folder / "half.py").write_text("from nets import tiny\n\ndef half():\n    return tiny().half()\n")
    assert cli("convert", "half.py:half", "--to", "gn", "--groups", "4", "--no-check").code == 0
    for command in ("distil", "finetune"):
        ran = cli(command, "half-gn.safetensors", "--trust-code", "--data", images, "--batch-size", "4", "--steps", "2")
        assert ran.code == 1, ran.err
        assert "for a file, convert a network that its factory makes in float32: --weights of half precision" in ran.err


def test_a_random_original_is_restored_from_the_file_not_built_anew(cli: Cli) -> None:
    assert cli("convert", "nets.py:fresh", *CONVERT).code == 0
    alone = cli("verify", "fresh-gn.safetensors", "--trust-code", "--json")
    for pair in (["nets.py:fresh", "fresh-gn.safetensors"], ["fresh-gn.safetensors", "nets.py:fresh"]):
        ran = cli("verify", *pair, "--trust-code", "--seed", 9, "--json")
        assert ran.code == 0, ran.err
        assert "its original is restored from fresh-gn.safetensors" in ran.err
        assert "fresh has random weights" not in ran.err
        ours = next(ran.json[side] for side in "ab" if ran.json[side]["file"] is None)
        assert ours["weights"]["digest"] == digest("fresh-gn.safetensors")
        if pair[0] == "nets.py:fresh":
            assert ran.json["error"] == alone.json["error"]


def trained(weights: str | None, cli: Cli, factor: float = 1.7) -> None:
    """fresh-gn.safetensors, changed since its conversion, so that nothing leads back."""
    options = [] if weights is None else ["--weights", weights]
    assert cli("convert", "nets.py:fresh", *CONVERT, *options).code == 0
    model = normswap.load("fresh-gn.safetensors", trust_code=True)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.mul_(factor)
    normswap.save(model, "fresh-gn.safetensors", overwrite=True)


def test_a_trained_file_is_not_compared_with_a_random_original(cli: Cli, nets: Any) -> None:
    torch.manual_seed(77)
    net = nets.fresh()
    net[1].running_mean.normal_()  # as training leaves it
    torch.save(net.state_dict(), "mine.pth")
    trained("mine.pth", cli)
    ran = cli("verify", "nets.py:fresh", "fresh-gn.safetensors", "--trust-code")
    assert ran.code == 1
    assert "(random: the factory's own), not what fresh-gn.safetensors was made from: mine.pth" in ran.err
    way = "normswap verify nets.py:fresh fresh-gn.safetensors --trust-code --weights mine.pth"
    assert way in ran.err
    assert cli(*way.split()[1:]).code == 0


def test_doubled_weights_which_undo_cleanly_do_not_pass_for_the_original(cli: Cli) -> None:
    trained(None, cli, factor=2.0)
    ran = cli("verify", "fresh-gn.safetensors", "--trust-code")
    assert ran.code == 1
    assert "the weights changed since the conversion" in ran.err


def test_what_exists_no_more_is_said_to_be_gone(cli: Cli) -> None:
    trained(None, cli)
    ran = cli("verify", "nets.py:fresh", "fresh-gn.safetensors", "--trust-code", "--seed", 9)
    assert ran.code == 1
    assert "Its random weights are gone" in ran.err
    assert cli("verify", "nets.py:fresh", "fresh-gn.safetensors", "--trust-code").code == 0  # the same seed, the same


def test_other_weights_than_those_a_file_was_made_from_are_said(cli: Cli, nets: Any) -> None:
    assert cli("convert", "nets.py:tiny", *CONVERT).code == 0
    torch.save(nets.tiny(seed=5).state_dict(), "mine.pth")
    ran = cli("verify", "nets.py:tiny", "tiny-gn.safetensors", "--trust-code", "--weights", "mine.pth")
    assert ran.code == 0
    assert "nets.py:tiny (mine.pth); tiny-gn.safetensors was made from other weights: the factory's own" in ran.err


@pytest.mark.parametrize("name", ["verify", "calibrate", "distil"])
def test_a_suggested_command_repeats_weights_and_arguments(cli: Cli, nets: Any, images: Path, name: str) -> None:
    torch.save(nets.tiny(6).state_dict(), "mine.pth")
    made = cli("convert", "nets.py:tiny", "--arg", "width=6", "--weights", "mine.pth", *CONVERT, "--no-undo")
    assert "normswap verify nets.py:tiny tiny-gn.safetensors --arg width=6 --weights mine.pth --trust-code" in made.out
    data = ["--data", images, "--batch-size", 4]
    options = {"verify": [], "calibrate": data, "distil": [*data, "--steps", 1]}
    ran = cli(name, "tiny-gn.safetensors", "--trust-code", *options[name])
    assert ran.code == 1
    assert "--arg width=6 --weights mine.pth" in ran.err
    way = next(line for line in ran.err.splitlines() if "Give the original as well: " in line).partition(": ")[2]
    again = cli(*way.split()[1:], "--json")
    assert again.code == 0, again.err
    original = again.json["a" if name == "verify" else "reference"]
    assert original["weights"]["name"] == "mine.pth"


def test_calibrate_and_distil_name_the_original_they_follow(cli: Cli, images: Path) -> None:
    assert cli("convert", "nets.py:tiny", *CONVERT).code == 0
    for name, more in (("calibrate", []), ("distil", ["--steps", 1, "--batch-size", 4])):
        ran = cli(name, "tiny-gn.safetensors", "--trust-code", "--data", images, *more)
        assert "nets.py:tiny (the factory's own; as it was before the conversion of tiny-gn.safetensors)" in ran.out


def test_a_random_reference_gives_way_to_the_original_in_the_file(cli: Cli, images: Path) -> None:
    assert cli("convert", "nets.py:fresh", *CONVERT).code == 0
    ran = cli("calibrate", "fresh-gn.safetensors", "--trust-code", "--data", images, "--reference", "nets.py:fresh",
              "--seed", 9, "--json")  # fmt: skip
    assert ran.json["reference"]["weights"]["digest"] == digest("fresh-gn.safetensors")


def test_finetune_and_inspect_name_the_weights(cli: Cli, nets: Any, images: Path) -> None:
    torch.save(nets.tiny().state_dict(), "mine.pth")
    ran = cli("finetune", "nets.py:tiny", "--weights", "mine.pth", "--data", images, "--steps", 1, "-o", "run")
    assert "nets.py:tiny (mine.pth)" in ran.out
    with safe_open("run/last.safetensors", framework="pt") as file:
        assert "mine.pth" in file.metadata()["normswap"]
    assert "Weights: mine.pth" in cli("inspect", "nets.py:tiny", "--weights", "mine.pth").out


@pytest.mark.parametrize("name", ["tiny", "fresh"])
def test_inspect_calls_the_weights_of_a_factory_as_convert_does(cli: Cli, name: str) -> None:
    ran = cli("convert", f"nets.py:{name}", *CONVERT)
    said = next(line for line in ran.out.splitlines() if line.startswith("Weights: "))
    assert said in cli("inspect", f"nets.py:{name}", "--input", "1,3,8,8").out.splitlines()
    asked = cli("inspect", f"nets.py:{name}", "--input", "1,3,8,8", "--weights", "none")
    assert "Weights: random" in asked.out.splitlines()


def test_a_file_that_was_made_from_another_network_is_told(cli: Cli) -> None:
    assert cli("convert", "nets.py:deep", *CONVERT, "-o", "deep.safetensors").code == 0
    assert cli("convert", "nets.py:tiny", *CONVERT, "-o", "own.safetensors").code == 0
    ran = cli("verify", "nets.py:tiny", "deep.safetensors", "--trust-code", "--input", "2,3,16,16")
    said = "deep.safetensors was made from nets.py:deep (the factory's own), not from nets.py:tiny (the factory's own)"
    assert f"note: {said}" in " ".join(ran.err.split())
    assert "made from" not in cli("verify", "nets.py:tiny", "own.safetensors", "--trust-code").err


def test_of_two_networks_in_a_checkpoint_the_one_taken_is_told(cli: Cli, nets: Any) -> None:
    torch.save({"model": nets.tiny().state_dict(), "ema": nets.tiny(seed=1).state_dict()}, "two.pth")
    ran = cli("convert", "nets.py:tiny", "--weights", "two.pth", "--to", "gn", "--groups", "4")
    assert ran.code == 0, ran.err
    assert (
        "note: two.pth holds model and ema: model is taken; in Python, torch.save(torch.load('two.pth')['ema']"
        in ran.err
    )


def test_one_shard_alone_asks_for_its_index_or_folder(cli: Cli, nets: Any) -> None:
    state = nets.tiny().state_dict()
    shard = "model-00001-of-00003.safetensors"
    Path("shards").mkdir()
    save_file({"0.weight": state["0.weight"]}, f"shards/{shard}")
    wanted = ("inspect", "nets.py:tiny", "--weights", f"shards/{shard}")
    assert f"{shard} is one of 3 files of one checkpoint: give the folder with all of them" in cli(*wanted).err
    Path("shards/model.safetensors.index.json").write_text("{}")
    assert "give shards/model.safetensors.index.json or its folder" in cli(*wanted).err
    save_file({"0.weight": state["0.weight"]}, "model-00001-of-00001.safetensors")
    assert "Check the source" in cli(*wanted[:3], "model-00001-of-00001.safetensors").err


def test_a_whole_pickled_network_finds_the_code_of_its_source(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("code").mkdir()
    Path("nets.py").rename("code/somenets.py")
    with monkeypatch.context() as patch:
        patch.syspath_prepend("code")
        made = importlib.import_module("somenets").residual()
        torch.save(made, "whole.pth")
        del sys.modules["somenets"]
    ran = cli(
        "convert",
        "code/somenets.py:residual",
        "--weights",
        "whole.pth",
        "--trust-pickle",
        "--to",
        "gn",
        "--groups",
        "4",
    )
    assert ran.code == 0, ran.err
    assert "somenets" not in sys.modules
    assert "code" not in " ".join(sys.path[:1])
    original = normswap.revert(normswap.load("residual-gn.safetensors", trust_code=True)).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in made.state_dict().items())
