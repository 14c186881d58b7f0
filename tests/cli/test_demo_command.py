from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from ran import Cli

from normswap.demo import story
from normswap.demo.story import Curve, Method, Story

pytestmark = pytest.mark.usefixtures("pictures")
NAMES = ("BatchNorm, the original", "γ and β copied", "folded", "+ calibrated", "+ distilled")
STORY = Story(
    seed=0,
    groups=4,
    training_images=1200,
    held_out_images=597,
    methods=tuple(Method(name, 0.95 + i / 100, 10 * i) for i, name in enumerate(NAMES)),
    curves=tuple(Curve(n, b, (0, 20, 40), (0.1, 0.5, 0.875)) for b in ("mixed", "same digit") for n in ("bn", "gn")),
)
"""Figures to show; those that are computed have tests of their own."""


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds with which the story was told, in place of telling it."""
    asked: list[int] = []

    def tell(seed: int, say: object) -> Story:
        asked.append(seed)
        return STORY

    monkeypatch.setattr(story, "tell", tell)
    return asked


def test_a_table_and_a_picture(cli: Cli, folder: Path) -> None:
    ran = cli("demo")
    assert ran.code == 0, ran.err
    for method in STORY.methods:
        assert method.name in ran.out
        assert f"{100 * method.accuracy:.1f}%" in ran.out
    assert ran.out.count("87.5%") == 4
    assert "Picture: normswap-demo.png" in ran.out
    with Image.open(folder / "normswap-demo.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1800, 780))
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 20


def test_json_holds_the_same(cli: Cli) -> None:
    ran = cli("demo", "--json", "--output", "story.png")
    assert ran.json["picture"] == "story.png"
    assert [m["accuracy"] for m in ran.json["methods"]] == [m.accuracy for m in STORY.methods]
    assert ran.json["curves"][0] == {
        "norm": "bn",
        "batches": "mixed",
        "steps": [0, 20, 40],
        "accuracy": [0.1, 0.5, 0.875],
    }


def test_the_seed_is_passed_on(cli: Cli, seeds: list[int]) -> None:
    assert cli("demo", "--seed", "7", "--quiet").out == ""
    assert seeds == [7]


def test_without_matplotlib_the_table_is_printed_all_the_same(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = cli("demo")
    assert ran.code == 0
    assert "+ distilled" in ran.out
    assert "Picture" not in ran.out
    assert "matplotlib is not installed" in ran.err
    assert not (folder / "normswap-demo.png").exists()


def test_a_picture_that_exists_is_kept_unless_forced(cli: Cli, folder: Path, seeds: list[int]) -> None:
    (folder / "mine.png").write_text("mine")
    ran = cli("demo", "-o", "mine.png")
    assert (ran.code, ran.out, seeds) == (1, "", [])
    assert "--force" in ran.err
    assert (folder / "mine.png").read_text() == "mine"
    assert cli("demo", "-o", "mine.png", "--force").code == 0
    assert (folder / "mine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "begin"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")])
def test_the_end_of_the_name_says_what_is_written(cli: Cli, folder: Path, name: str, begin: bytes) -> None:
    assert cli("demo", "-o", name).code == 0
    assert (folder / name).read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["nets.py", "a.txt", "picture"])
def test_what_is_no_picture_is_refused_before_anything_is_computed(
    cli: Cli, folder: Path, seeds: list[int], name: str
) -> None:
    before = (folder / "nets.py").read_text()
    ran = cli("demo", "-o", name, "--force")
    assert (ran.code, seeds) == (1, [])
    assert f"{name} is not a name for a picture" in ran.err
    assert (folder / "nets.py").read_text() == before
