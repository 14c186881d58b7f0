"""`normswap evaluate`, and `--fail-below` of both commands that measure."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ran import COLOURS, Cli

from normswap.data import write_shapes

ASK = ("evaluate", "nets.py:tiny", "--data", "photos")


def right(nets: Any, images: Path) -> list[bool]:
    """Which of the 12 images the network tells rightly, counted by hand."""
    found = []
    for label, name in enumerate(sorted(COLOURS)):
        for file in sorted((images / name).iterdir()):
            x = torch.from_numpy(np.array(Image.open(file))).float().permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                found.append(int(nets.tiny().eval()((x - 0.5) / 0.25).argmax()) == label)
    return found


def test_the_accuracy_of_all_and_of_each_class_is_shown(cli: Cli, nets: Any, images: Path) -> None:
    ran = cli(*ASK, "--mean", "0.5", "--std", "0.25")
    hits = right(nets, images)
    assert ran.code == 0, ran.err
    assert f"accuracy  {sum(hits) / 12:.4f}" in ran.out
    assert "photos: 12 images; size 20x20, mean 0.5 0.5 0.5" in ran.out
    for i, name in enumerate(sorted(COLOURS)):
        line = next(line for line in ran.out.splitlines() if line.startswith(name))
        assert line.split()[1:3] == ["3", f"{sum(hits[3 * i : 3 * i + 3]) / 3:.4f}"]


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (("--mean", "127.5", "--std", "51,102,51"), "--mean 0.5 --std 0.2,0.4,0.2"),
        (("--mean", "102,51,153", "--std", "1"), "--mean 0.4,0.2,0.6 --std 0.00392"),
        (("--std", "51"), "--std 0.2"),
    ],
)
def test_a_mean_for_values_up_to_255_is_refused_with_what_to_give_instead(
    cli: Cli, images: Path, given: tuple[str, ...], instead: str
) -> None:
    ran = cli(*ASK, *given)
    assert (ran.code, ran.out) == (2, "")
    assert f"pixels are from 0 to 1, not to 255, which {given[0]} is for; divided by 255: {instead}\n" in ran.err


def test_json_holds_it_all_and_so_does_the_file(cli: Cli, images: Path) -> None:
    ran = cli(*ASK, "--json", "-o", "all.json")
    assert ran.json == json.loads(Path("all.json").read_text())
    assert ran.json["score"] == ran.json["figures"]["accuracy"]
    assert sum(count for _, _, count in ran.json["confusion"]) == ran.json["images"] == 12
    assert ran.json["network"]["source"]["name"] == "nets.py:tiny"


@pytest.mark.usefixtures("pictures")
def test_the_confusion_matrix_is_written_as_a_table_or_a_picture(cli: Cli, images: Path) -> None:
    assert cli(*ASK, "-o", "matrix.csv").code == 0
    with open("matrix.csv", encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file))
    assert head[1:] == [row[0] for row in rows]
    cells = np.array([row[1:] for row in rows], int)
    assert cells.sum() == 12
    figures = cli(*ASK, "--json").json
    assert cells.trace() == round(12 * figures["score"])
    ran = cli(*ASK, "-o", "matrix.png", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    with Image.open("matrix.png") as picture:
        assert picture.size[0] > 100


def test_a_matrix_that_cannot_be_written_is_told_before_any_work(cli: Cli, images: Path) -> None:
    ran = cli(*ASK, "-o", "matrix.png")  # as on a machine without matplotlib
    assert ran.code == 1
    assert "a picture needs matplotlib" in ran.err
    assert "building" not in ran.err
    ran = cli(*ASK, "--task", "detection", "-o", "matrix.csv")
    assert ran.code == 2
    assert "detection has no confusion matrix" in ran.err


def test_a_name_that_says_nothing_of_the_kind_is_refused_before_any_work(cli: Cli, images: Path) -> None:
    ran = cli(*ASK, "-o", "result.txt")
    assert ran.code == 1
    assert "Let it end in .json, .csv, .png" in ran.err
    assert "building" not in ran.err
    Path("there.json").write_text("{}")
    assert "exists already\n--force replaces it" in cli(*ASK, "-o", "there.json").err
    assert cli(*ASK, "-o", "there.json", "--force").code == 0


def test_3_is_the_exit_code_below_the_limit_and_the_result_is_shown_all_the_same(cli: Cli, images: Path) -> None:
    figure = cli(*ASK, "--json").json["score"]
    assert 0 < figure < 1
    assert cli(*ASK, "--fail-below", figure).code == 0
    ran = cli(*ASK, "--fail-below", figure + 0.01, "--json")
    assert ran.code == 3
    assert ran.json["score"] == figure
    assert ran.err.endswith(f"error: accuracy {figure:.4f} is below {figure + 0.01:g}\n")


def test_verify_exits_with_3_below_the_agreement_asked_for(cli: Cli, nets: Any, images: Path) -> None:
    torch.save(nets.tiny(seed=3).state_dict(), "other.pth")
    pair = ["verify", "nets.py:tiny", "nets.py:tiny", "--data", "photos"]
    assert cli(*pair, "--fail-below", 1).code == 0
    apart = [*pair, "--weights", "other.pth"]
    agreement = cli(*apart, "--json").json["agreement"]
    assert agreement < 1
    assert cli(*apart, "--fail-below", agreement).code == 0
    ran = cli(*apart, "--fail-below", 1)
    assert ran.code == 3
    assert f"agreement {agreement:.4f} is below 1" in ran.err


def test_outputs_without_decisions_have_no_agreement_to_fail_on(cli: Cli) -> None:
    ran = cli("verify", "nets.py:residual", "nets.py:residual", "--input", "1,3,8,8", "--fail-below", 0.5)
    assert ran.code == 1
    assert "these outputs hold none" in ran.err


def test_a_segmentation_network_is_measured(cli: Cli) -> None:
    write_shapes("shapes", 3, size=32)
    Path("own.py").write_text(
        "import torch\nfrom torch import nn\ndef pixels():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()\n"
    )
    ran = cli("evaluate", "own.py:pixels", "--task", "segmentation", "--data", "shapes")
    assert ran.code == 0, ran.err
    assert "mean IoU" in ran.out
    assert "most often taken for" in ran.out
    refused = cli("evaluate", "own.py:pixels", "--task", "detection", "--data", "shapes")
    assert refused.code == 2
    assert "the network does not work as torchvision's detectors do" in refused.err


@pytest.mark.parametrize(
    "more",
    [
        ["--fail-below", "1.5"],
        ["--annotations", "a.json"],
        ["--task", "regression"],
        ["--task", "detection", "--size", "32"],
        ["--task", "detection", "--data", "torchvision:CIFAR10"],
        ["--batch-size", "0"],
        ["--workers", "-1"],
    ],
)
def test_calls_that_make_no_sense_are_usage_errors(cli: Cli, more: list[str]) -> None:
    ran = cli(*ASK, *more)
    assert (ran.code, ran.out) == (2, "")


def test_images_without_classes_cannot_be_measured_on(cli: Cli, images: Path) -> None:
    ran = cli("evaluate", "nets.py:tiny", "--data", "photos/red")
    assert ran.code == 1
    assert "one subfolder for each class" in ran.err
    assert cli("evaluate", "nets.py:tiny", "--data", "nowhere").code == 1
