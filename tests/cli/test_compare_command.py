"""`normswap compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ran import Cli

BASE = ("compare", "nets.py:tiny", "--data", "photos", "--size", "20", "--calibrate-images", "8")


@pytest.mark.usefixtures("pictures")
def test_without_batch_sizes_accuracy_stands_over_the_number_of_groups(cli: Cli, images: Path, folder: Path) -> None:
    ran = cli(*BASE, "--groups", "1,4")
    assert ran.code == 0, ran.err
    assert "gn, groups 4 (3 of 3)" in ran.err
    assert "Written: runs/tiny-compare: table.csv, table.json, table.md, accuracy-over-groups.png" in ran.out
    assert (folder / "runs" / "tiny-compare" / "accuracy-over-groups.png").is_file()
    again = cli(*BASE, "--groups", "1,4", "--json")
    assert "of 3" not in again.err
    assert [cell["groups"] for cell in again.json["cells"]] == [None, 1, 4]


def test_with_batch_sizes_every_cell_is_a_run_that_can_be_opened(cli: Cli, images: Path, folder: Path) -> None:
    ran = cli(*BASE, "--norms", "bn,gn", "--batch-sizes", "4", "--epochs", "1", "--augment", "none", "-o", "out")
    assert ran.code == 0, ran.err
    for name in ("bn-batch-4", "gn-auto-batch-4"):
        assert cli("inspect", f"out/cells/{name}/last.safetensors", "--trust-code").code == 0
    assert len(json.loads((folder / "out" / "table.json").read_text())["cells"]) == 2


OWN = """
import torch
from nets import trained
from torch import nn


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def own():
    print("a user's own words")
    return trained(Own())
"""


def test_a_process_of_its_own_takes_classes_of_the_users_own_file_and_says_the_same(
    cli: Cli, images: Path, folder: Path
) -> None:
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    ask = ("compare", "own.py:own", *BASE[2:], "--groups", "2", "--json")
    alone, apart = cli(*ask, "-o", "one"), cli(*ask, "-o", "two", "--devices", "cpu")
    assert apart.code == 0, apart.err
    assert "gn, groups 2 (2 of 2) on cpu" in apart.err
    dropped = {"seconds"}
    rows = [
        [{k: v for k, v in cell.items() if k not in dropped} for cell in ran.json["cells"]] for ran in (alone, apart)
    ]
    assert rows[0] == rows[1]


def test_how_many_images_the_figures_rest_on_and_what_was_held_back_is_said(cli: Cli, images: Path) -> None:
    ran = cli(*BASE, "--norms", "bn")
    assert "accuracy on 4 validation images, of which one makes 0.2500" in ran.out
    assert "note: no validation images: 4 of the 12 images are held back for it (seed 0)" in ran.out


def test_data_of_other_classes_needs_training(cli: Cli, images: Path) -> None:
    (images / "red").rename(images.parent / "red")
    ran = cli(*BASE)
    assert ran.code == 1
    assert "the data has 3 classes and the network tells 4 apart" in ran.err


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--norms", "bn,gnn"), "'gnn' is not one of"),
        (("--groups", "1,x"), "'1,x' is not like 1,2,4"),
        (("--groups", "0"), "'0' is not like 1,2,4"),
        (("--batch-sizes", "auto"), "'auto' is not like 1,2,4"),
        (("--epochs", "2"), "--epochs goes with --batch-sizes"),
        (("--devices", "cpu,tpu"), "'tpu' is not like cuda:0,cuda:1 or cpu,cpu"),
        (("--devices", "cpu,cpu", "--device", "cpu"), "--device and --devices exclude each other"),
        (("--devices", "cpu,cuda:9"), "device 'cuda:9' cannot be used"),
        (("--annotations", "a.json"), "go with --task detection"),
        (("-o", "photos/out"), "is within the data"),
    ],
)
def test_what_makes_no_sense_ends_with_2(cli: Cli, images: Path, options: tuple[Any, ...], what: str) -> None:
    ran = cli(*BASE, *options)
    assert (ran.code, ran.out) == (2, "")
    assert what in " ".join(ran.err.split())
