"""The norms' pages are all there, listed, and filled in."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from normswap.norms.registry import specs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAMES = [spec.name for spec in specs()]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    found = importlib.util.spec_from_file_location("_hooks", DOCS / "_hooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_norm_has_a_page_and_every_page_is_of_a_norm() -> None:
    assert sorted(path.stem for path in (DOCS / "norms").glob("*.md")) == sorted(NAMES)


def test_the_navigation_lists_the_pages_in_the_order_of_the_norms(hooks: ModuleType) -> None:
    config = hooks.on_config(SimpleNamespace(nav=[{"Home": "index.md"}, {"Norms": []}]))
    assert config.nav == [{"Home": "index.md"}, {"Norms": [{name: f"norms/{name}.md"} for name in NAMES]}]
    assert "\n  - Norms: []" in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_the_facts_of_its_norm(hooks: ModuleType, name: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=f"norms/{name}.md"))
    text = hooks.on_page_markdown((DOCS / "norms" / f"{name}.md").read_text("utf-8"), page=page)
    assert text.startswith(f"# {name}: ")
    assert next(spec.formula for spec in specs() if spec.name == name) in text


def test_the_first_page_links_all_of_them(hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = hooks.on_page_markdown((DOCS / "index.md").read_text("utf-8"), page=page)
    assert re.findall(r"\(norms/(.*?)\.md\)", text) == NAMES


def test_no_other_page_has_the_comment_that_stands_for_the_facts(hooks: ModuleType) -> None:
    having = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if hooks.MARKER in p.read_text("utf-8")}
    assert having == {"api.md", "cli.md", "index.md", "recipes.md", *(f"norms/{name}.md" for name in NAMES)}
