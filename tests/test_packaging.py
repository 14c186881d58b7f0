"""What the package says of itself: Pythons, extras, version and how to install it agree wherever they are named."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import normswap
from normswap.tracing.followed import KNOWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_place_names_the_same_pythons(project: dict[str, Any]) -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix[:-2]) for c in project["project"]["classifiers"] if c.startswith(prefix)]
    assert named == PYTHONS
    assert project["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert project["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")
    assert f"pythons=({' '.join(PYTHONS)})" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}." in (ROOT / "README.md").read_text("utf-8")
    assert {f"{major}.{minor}" for major, minor in KNOWN[1]} <= {*PYTHONS}


def test_every_extra_that_is_named_exists(project: dict[str, Any]) -> None:
    extras = {*project["project"]["optional-dependencies"]}
    texts = [ROOT / "README.md", ROOT / "pyproject.toml", *ROOT.glob("docs/**/*.md")]
    texts += [file for part in ("normswap", "recipes") for file in (ROOT / part).rglob("*.py")]
    named = re.compile(r"(?:normswap|'\.)\[([a-z,]+)\]")
    found = {(e, str(f)) for f in texts for m in named.findall(f.read_text("utf-8")) for e in m.split(",")}
    assert {extra for extra, _ in found} >= {"train", "timm", "onnx"}
    assert {(extra, file) for extra, file in found if extra not in extras} == set()


def test_no_page_installs_normswap_from_an_index() -> None:
    """A hint of the package itself may name an extra: pip takes what is installed, and adds to it."""
    for file in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        assert not re.search(r"pip install[^`\n]*\bnormswap\b", file.read_text("utf-8")), file


def test_the_changelog_tells_of_the_version_and_keeps_a_place_for_the_next() -> None:
    heads = re.findall(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    assert heads[:2] == ["Unreleased", normswap.__version__]
