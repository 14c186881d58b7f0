"""A converted file whose network is built by a Python file, somewhere else than where it was made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

import normswap
from normswap.errors import CheckpointError, OptionError, SourceError

NETS = """
import torch
from torch import nn


def build(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
"""


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in a folder of its own, next to the code; the current folder is empty."""
    from normswap.sources.spec import Source

    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    made.mkdir()
    elsewhere.mkdir()
    (made / "own_nets.py").write_text(NETS)
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for kind, name in (("file", "own_nets.py:build"), ("factory", "own_nets:build")):
        from normswap.sources.resolve import build

        model, source = build(Source(kind, name, {"width": 8}))
        converted = normswap.convert(model, "gn", groups=2, check=False)
        converted._normswap.source = source.to_dict()
        normswap.save(converted, f"{kind}.safetensors")
        sys.modules.pop("own_nets", None)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(made)])
    monkeypatch.chdir(elsewhere)
    return made


@pytest.mark.parametrize("kind", ["file", "factory"])
def test_code_is_found_beside_the_file(moved: Path, kind: str) -> None:
    file = moved / f"{kind}.safetensors"
    with pytest.raises(CheckpointError, match="would run that code"):
        normswap.load(file)
    loaded = normswap.load(file, trust_code=True)
    assert loaded[0].weight.shape == (8, 3, 1, 1)
    again = normswap.save(loaded, "again.safetensors")  # says what the first one said
    assert normswap.load(shutil.copy(again, moved), trust_code=True)._normswap.source == loaded._normswap.source
    assert loaded._normswap.source["name"].startswith("own_nets")
    sys.modules.pop("own_nets", None)


def test_code_in_another_place_is_named_with_the_arguments_of_before(moved: Path) -> None:
    file = Path(shutil.copy(moved / "file.safetensors", "alone.safetensors"))
    with pytest.raises(SourceError) as caught:
        normswap.load(file, trust_code=True)
    assert "neither in the current folder nor beside the file" in caught.value.message
    assert caught.value.hint.startswith("source says where it is")
    loaded = normswap.load(file, source=f"{moved / 'own_nets.py'}:build")
    assert loaded[0].weight.shape == (8, 3, 1, 1)
    assert torch.equal(loaded[0].weight, normswap.load(moved / "file.safetensors", trust_code=True)[0].weight)
    assert loaded._normswap.source["name"] == f"{moved / 'own_nets.py'}:build"
    with pytest.raises(OptionError, match="exclude each other"):
        normswap.load(file, loaded, source="own_nets.py:build")


def test_a_file_that_knows_no_source_takes_one(moved: Path) -> None:
    model = normswap.load(moved / "file.safetensors", trust_code=True)
    model._normswap.source = None
    normswap.save(model, "unknown.safetensors")
    with pytest.raises(CheckpointError, match="does not know how to build"):
        normswap.load("unknown.safetensors", trust_code=True)
    (moved / "wide.py").write_text(NETS.replace("width=4", "width=8"))
    assert normswap.load("unknown.safetensors", source=f"{moved / 'wide.py'}:build")[0].weight.shape[0] == 8
