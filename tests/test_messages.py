"""Options in messages are data: no file of the library writes a flag, and every option is one that exists."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import normswap
from normswap.arguments import one_of, seed_value
from normswap.cli import app
from normswap.cli.terminal.flags import words
from normswap.errors import UNSET, Fix, NormswapError, Text, did_you_mean, plural

PACKAGE = Path(normswap.__file__).parent
LIBRARY = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ("cli", "demo")]
PYTHON_ONLY = {"affine", "checkpoint", "data", "inplace", "model", "norm", "stats"}
"""Options that some function has and no command."""


def texts(tree: ast.AST) -> Iterator[str]:
    """String constants but no docstrings, those of a call joined to one."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    alone = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings of constants
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | alone:
            yield node.value


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_writes_flags_only_in_whole_commands(path: Path) -> None:
    for text in texts(ast.parse(path.read_text("utf-8"))):
        if "normswap " not in text and "pip " not in text:
            assert not re.search(r"(?<![\w-])--[a-z]", text), text


def flags() -> set[str]:
    group: Any = typer.main.get_command(app)
    return {
        flag for command in group.commands.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)
    }


def test_every_option_in_a_message_is_one_of_some_command_or_known_as_pythons_own() -> None:
    known, found = flags(), set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fix":
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    try:
                        value = ast.literal_eval(node.args[1]) if len(node.args) > 1 else UNSET
                    except ValueError:
                        value = UNSET
                    found.add(name.value)
                    if name.value not in PYTHON_ONLY and not isinstance(value, dict):
                        exists = words(Fix(name.value, value))[0] in known
                        assert exists or (name.value, value) == ("undo", True), (path, name.value)
    assert {"groups", "batch_size", "trust_pickle", *PYTHON_ONLY} <= found


def test_no_option_is_lost_in_a_formatted_string() -> None:
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
                assert "Fix" not in {call.func.id for call in calls}, (path, node.lineno)


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("GN", ("bn", "gn", "ln"), "gn"),
        ("CUDA", ("auto", "cpu", "cuda"), "cuda"),
        ("Refit", ("balance", "refit"), "refit"),
        ("ResNet50", ("resnet18", "resnet50"), "resnet50"),
        ("gm", ("bn", "gn"), "gn"),
        ("imagenet1k_v2", ("IMAGENET1K_V2",), "IMAGENET1K_V2"),
        ("cifar", ("CIFAR10",), "CIFAR10"),
        ("xyzzy", ("bn", "gn"), None),
    ],
)
def test_a_near_word_is_found_whatever_its_case(word: str, known: tuple[str, ...], near: str | None) -> None:
    hint = did_you_mean(word, known)
    assert hint == (None if near is None else f"Did you mean {near}?")


def test_a_word_of_a_function_is_suggested_too() -> None:
    with pytest.raises(NormswapError, match=r"task must be one of a, bc, de, got 'DE'\nDid you mean de\?"):
        one_of("task", "DE", ("a", "bc", "de"))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0"])
def test_a_seed_is_an_integer_below_2_to_the_32(seed: object) -> None:
    with pytest.raises(NormswapError, match="seed must be an integer from 0"):
        seed_value("seed", seed)
    seed_value("seed", 2**32 - 1)


def test_one_of_a_thing_is_singular() -> None:
    assert [plural(n, "group") for n in (0, 1, 2)] == ["0 groups", "1 group", "2 groups"]


def test_options_in_a_message_stay_data_on_their_way_to_another_process() -> None:
    sent = pickle.loads(pickle.dumps(Text("Leave ", Fix("resume"), " out, or ", Fix("groups", 4), ".")))
    assert str(sent) == "Leave resume out, or groups=4."
    assert sent.written(lambda fix: f"--{fix.option}") == "Leave --resume out, or --groups."
