"""The norms' pages are all there and listed, and the page on adding one says what the file of `rms` says."""

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
COMMANDS = [f"commands/{path.name}" for path in (DOCS / "commands").glob("*.md")]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    found = importlib.util.spec_from_file_location("_hooks", DOCS / "_hooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def blocks(title: str | None) -> list[str]:
    """The Python of docs/extending.md that has this title."""
    fence = "```python" + (f' title="{title}"' if title else "")
    return re.findall(rf"^{re.escape(fence)}\n(.*?)^```$", (DOCS / "extending.md").read_text("utf-8"), re.M | re.S)


def code(text: str) -> list[str]:
    """Its lines but for empty ones: between blocks there is prose, not two empty lines."""
    return [line for line in text.splitlines() if line]


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


def test_the_page_on_choosing_shows_every_conversion(hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="which-norm.md"))
    text = hooks.on_page_markdown((DOCS / "which-norm.md").read_text("utf-8"), page=page)
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip("` ") for cell in line] for line in lines if len(line) == 1 + len(NAMES)]
    shown = {(row[0], target): row[i] for row in rows for i, target in enumerate(NAMES, 1)}
    assert shown["gn", "frozen"] == "needs images"
    assert shown["bn", "frozen"] == "exact"
    assert {source for source, _ in shown} == set(NAMES) - {"fused"}


def test_the_page_on_adding_a_norm_goes_through_the_whole_file_and_nothing_else() -> None:
    file = "normswap/norms/rms.py"
    assert code("".join(blocks(file))) == code((ROOT / file).read_text("utf-8"))


def test_what_it_shows_of_the_test_stands_there() -> None:
    file = "tests/norms/test_rms.py"
    shown = blocks(file)
    assert shown
    assert all(block in (ROOT / file).read_text("utf-8") for block in shown)


def test_what_it_says_of_the_norm_then_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in blocks(None):
        exec(compile(shown, "docs/extending.md", "exec"), {"__name__": "extending"})
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["1", "1", "RMSNorm", "64"]


def test_every_field_that_has_a_default_is_explained() -> None:
    import dataclasses

    from normswap.norms.spec import NormSpec

    table = (DOCS / "extending.md").read_text("utf-8").partition("\n| field ")[2].partition("\n\n")[0]
    told = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    optional = {f.name for f in dataclasses.fields(NormSpec) if f.default is not dataclasses.MISSING}
    assert told == optional - {"build"}


def test_no_other_page_has_the_comment_that_stands_for_the_facts(hooks: ModuleType) -> None:
    having = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if hooks.MARKER in p.read_text("utf-8")}
    assert having == {"api.md", "cli.md", "index.md", "recipes.md", *(f"norms/{name}.md" for name in NAMES), *COMMANDS}
