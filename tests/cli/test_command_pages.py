"""Every command has its page, with a picture of what it shows, made by the script of the documentation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def module(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return module("_hooks")


@pytest.fixture(scope="module")
def names(hooks: ModuleType) -> list[str]:
    return [name for page in hooks.command_pages() for name in page]


def test_every_command_has_a_page_and_every_page_is_of_a_command(names: list[str]) -> None:
    assert {"convert", "compare", "demo"} < set(names)
    assert sorted(path.stem for path in (DOCS / "commands").glob("*.md")) == sorted(names)


def test_the_navigation_lists_the_pages_in_the_order_of_help(hooks: ModuleType, names: list[str]) -> None:
    config = hooks.on_config(SimpleNamespace(nav=[{"Commands": []}]))
    assert config.nav == [{"Commands": [{name: f"commands/{name}.md"} for name in names]}]
    assert "\n  - Commands: []" in (DOCS.parent / "mkdocs.yml").read_text("utf-8")


def test_every_page_shows_usage_options_and_a_picture_that_is_there(hooks: ModuleType, names: list[str]) -> None:
    for name in names:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=f"commands/{name}.md"))
        text = hooks.on_page_markdown((DOCS / "commands" / f"{name}.md").read_text("utf-8"), page=page)
        assert text.startswith(f"# normswap {name}\n")
        assert f"```text\nnormswap {name} [OPTIONS]" in text
        (picture,) = re.findall(r"!\[[^\]]+\]\(\.\./assets/(.*?)\)", text)
        assert picture == f"{name}.svg"
        assert "<svg" in (DOCS / "assets" / picture).read_text("utf-8")


def test_every_picture_is_drawn_by_the_script_from_a_command_line_that_exists(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl", reason="a terminal of POSIX")
    monkeypatch.syspath_prepend(str(DOCS))
    commands = module("_picture").COMMANDS
    sys.modules.pop("_evaluating", None)
    known = dict(hooks._commands()[2])
    assert sorted(commands) == sorted(known)
    for name, line in commands.items():
        assert line.split()[:2] == ["normswap", name]
        flags = {flag for param in known[name].params for flag in param.opts}
        assert {word for word in line.split() if word.startswith("-")} <= flags


def test_the_reference_links_all_of_them(hooks: ModuleType, names: list[str]) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="cli.md"))
    text = hooks.on_page_markdown((DOCS / "cli.md").read_text("utf-8"), page=page)
    assert re.findall(r"\(commands/(.*?)\.md\)", text) == names
