"""`normswap card`: a folder for the hub, read back by huggingface_hub and by the script in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from ran import Cli
from test_report_option import HOSTILE

import normswap


def card(cli: Cli, file: str, *more: object) -> ModelCard:
    ran = cli("card", file, *more)
    assert ran.code == 0, ran.err
    return ModelCard.load(Path(file).stem + "-hub/README.md")


def converted(cli: Cli, source: str = "nets.py:tiny", *more: str) -> str:
    assert cli("convert", source, "--to", "gn", "--groups", "2", *more, "-o", "net.safetensors").code == 0
    return "net.safetensors"


def test_the_hub_reads_the_front_matter_and_what_is_unknown_is_left_out(cli: Cli) -> None:
    found = card(cli, converted(cli))
    assert found.data.to_dict() == {"library_name": "normswap", "tags": ["normswap", "pytorch", "group-norm"]}
    assert "## What changed" in found.text
    assert "| `1` | 1 | 8 | BatchNorm2d | gn (2 groups, eps 1) | folded |" in found.text


def test_a_card_takes_the_flag_that_other_commands_need_for_the_same_file(cli: Cli) -> None:
    assert card(cli, converted(cli), "--trust-code").data.library_name == "normswap"


def test_license_task_and_figures_are_shown(cli: Cli, images: Path) -> None:
    file = converted(cli)
    ask = ("evaluate", file, "--trust-code", "--data", "photos", "-o", "all.json", "--json")
    figure = cli(*ask).json["figures"]["accuracy"]
    found = card(cli, file, "--license", "apache-2.0", "--evaluation", "all.json")
    assert found.data.license == "apache-2.0"
    assert found.data.pipeline_tag == "image-classification"
    assert f"On 12 images of `photos`:\n\n| figure | value |\n|---|---:|\n| accuracy | {figure:.4f} |" in found.text


@pytest.mark.usefixtures("images")
def test_the_card_of_a_trained_file_claims_no_equality_and_is_called_as_the_network(cli: Cli) -> None:
    assert "reduced to its scale and shift, the network equals the original" in card(cli, converted(cli)).text
    train = ["--trust-code", "--data", "photos", "--steps", "1", "--device", "cpu", "--json"]
    assert cli("finetune", "net.safetensors", *train, "-o", "run").code == 0
    assert cli("card", "run/best.safetensors", "-o", "hub").code == 0
    text = Path("hub/README.md").read_text()
    assert "# tiny-gn\n" in text
    assert "equals the original" not in text
    assert "Right after the conversion, with every new norm reduced" in text
    assert "the network equalled the original to" in text


def test_a_license_that_the_hub_does_not_know_is_told_with_the_usual_ones(cli: Cli) -> None:
    file = converted(cli)
    ran = cli("card", file, "--license", "apache-2")
    assert ran.code == 0
    assert "the hub knows no license 'apache-2'; usual ones are apache-2.0, mit" in ran.err
    assert "license" not in cli("card", file, "--license", "cc-by-sa-4.0", "--force").err


def test_no_path_of_this_machine_is_in_the_card_and_its_undo_line_names_a_file_that_is_there(
    cli: Cli, folder: Path, images: Path
) -> None:
    (folder / "a b").mkdir()
    (folder / "a b" / "own nets.py").write_text((folder / "nets.py").read_text())
    file = folder / "a b" / "my net.safetensors"
    source = f"{folder}/a b/own nets.py:tiny"
    assert cli("convert", source, "--to", "gn", "--groups", "2", "-o", file).code == 0
    assert cli("evaluate", file, "--trust-code", "--data", images, "-o", "all.json").code == 0
    assert cli("card", file, "--evaluation", "all.json", "-o", "hub").code == 0
    text = Path("hub/README.md").read_text()
    assert "`own nets.py:tiny`" in text
    assert str(folder) not in text
    assert "a b" not in text
    assert "$ normswap convert --to original --trust-code model.safetensors\n" in text
    assert Path("hub/model.safetensors").exists()


def test_a_comparison_in_the_place_of_an_evaluation_is_told_and_not_written_over(cli: Cli) -> None:
    Path("table.json").write_text('{"cells": []}')
    ran = cli("card", converted(cli), "--evaluation", "table.json")
    assert ran.code == 1
    assert "table.json is not what normswap evaluate writes (it is of normswap compare, and of several" in ran.err
    assert "-o evaluation.json" in ran.err
    assert "-o table.json" not in ran.err


def test_figures_of_another_network_are_refused(cli: Cli, images: Path) -> None:
    file = converted(cli)
    assert cli("evaluate", "nets.py:real", "--data", "photos", "-o", "other.json").code == 0
    ran = cli("card", file, "--evaluation", "other.json")
    assert ran.code == 1
    assert "the evaluation is of nets.py:real, and net.safetensors is made of nets.py:tiny" in ran.err
    assert not Path("net-hub").exists()


def test_the_folder_stands_alone(cli: Cli, tmp_path: Path) -> None:
    card(cli, converted(cli))
    assert {path.name for path in Path("net-hub").iterdir()} == {"README.md", "load.py", "model.safetensors", "nets.py"}
    moved = tmp_path / "elsewhere" / "net"
    shutil.copytree("net-hub", moved)
    Path("nets.py").unlink()
    script = [sys.executable, str(moved / "load.py")]
    done = subprocess.run(script, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True)
    assert "GroupNorm(2, 8" in done.stdout
    model = normswap.load(moved / "model.safetensors", trust_code=True)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_library_networks_name_their_task_and_their_base(cli: Cli) -> None:
    source = ["--weights", "none", "--no-check", "--indivisible", "nearest"]
    found = card(cli, converted(cli, "lraspp_mobilenet_v3_large", *source, "--arg", "weights_backbone=None"))
    assert found.data.pipeline_tag == "image-segmentation"
    assert found.data.base_model is None
    from normswap.pages.model_card import _base_model
    from normswap.sources.spec import Source

    published = {"name": "a1_in1k", "random": False, "given": None, "digest": ""}
    assert _base_model(Source("timm", "resnet18.a1_in1k", weights=published)) == "timm/resnet18.a1_in1k"
    assert _base_model(Source("hf", "microsoft/resnet-18", weights=published)) == "microsoft/resnet-18"
    assert _base_model(Source("timm", "resnet18.a1_in1k", weights={**published, "random": True})) is None
    assert _base_model(Source("timm", "resnet18.a1_in1k", weights={**published, "given": "mine.pth"})) is None


def test_names_of_strangers_end_no_cell_and_no_front_matter(cli: Cli) -> None:
    Path("bad.py").write_text(HOSTILE.replace("</pre></details>", "a|`b`\\n---\\n"), encoding="utf-8")
    found = card(cli, converted(cli, "bad.py:nasty", "--groups", "1"), "--license", 'mit"\n---\nevil: 1')
    assert found.data.license == 'mit"\n---\nevil: 1'
    rows = [line for line in found.text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {7}
    assert "<script>" not in "".join(row for row in rows if not row.startswith("| `"))


def test_places_and_files_that_will_not_do_are_told(cli: Cli) -> None:
    file = converted(cli)
    assert cli("card", file).code == 0
    again = cli("card", file)
    assert (again.code, again.out) == (1, "")
    assert "net-hub is not empty\n--force writes over" in again.err
    assert cli("card", file, "--force").code == 0
    assert "is not a file that normswap wrote" in cli("card", "nets.py").err
    assert "net.safetensors is a file" in cli("card", file, "-o", file).err
    for text in ("{}", "[1]", "no", json.dumps({"task": "classification", "figures": {}, "data": "", "images": 1})):
        Path("all.json").write_text(text)
        ran = cli("card", file, "-o", "new", "--evaluation", "all.json")
        assert (ran.code, Path("new").exists()) == (1, False)
        assert "all.json is not what normswap evaluate writes" in ran.err


def test_a_folder_that_cannot_be_completed_goes_again(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    file = converted(cli)
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cli("card", file).code == 1
    assert not Path("net-hub").exists()


def test_json_names_what_was_written(cli: Cli) -> None:
    ran = cli("card", converted(cli), "--json")
    assert ran.json == {
        "folder": "net-hub",
        "files": ["model.safetensors", "README.md", "load.py"],
        "code": ["nets.py"],
    }
