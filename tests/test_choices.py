"""The words of options stand in one place, for Python, the command line and its completion."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

import normswap
from normswap import choices
from normswap.cli import app

WORDS = {name: value for name, value in vars(choices).items() if isinstance(value, tuple)}
PACKAGE = Path(normswap.__file__).parent


def test_no_file_but_one_lists_the_words_of_an_option() -> None:
    known = {frozenset(value) for value in WORDS.values()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Tuple) and all(isinstance(e, ast.Constant) for e in node.elts):
                found = frozenset(e.value for e in node.elts if isinstance(e, ast.Constant))
                assert found not in known or path.name == "choices.py", f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("function", "argument", "kind"),
    [
        ("convert", "transfer", choices.Transfer),
        ("plan", "indivisible", choices.Indivisible),
        ("calibrate", "method", choices.Method),
        ("distil", "train", choices.Parameters),
        ("distil", "augment", choices.Augment),
        ("finetune", "task", choices.Task),
        ("finetune", "augment", choices.Augment),
        ("compare", "device", choices.Device),
        ("evaluate", "task", choices.Task),
        ("export", "to", choices.Export),
    ],
)
def test_the_signature_of_a_public_function_names_the_words(function: str, argument: str, kind: Any) -> None:
    assert get_args(get_type_hints(getattr(normswap, function))[argument]) == get_args(kind)


def _options() -> list[Any]:
    root: Any = typer.main.get_command(app)
    return [(name, p) for name, command in root.commands.items() for p in command.params]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--method", choices.METHODS),
        ("--task", choices.TASKS),
        ("--augment", choices.AUGMENTS),
        ("--to", choices.NORMS),
        ("--transfer", choices.TRANSFERS),
        ("--indivisible", choices.INDIVISIBLE),
        ("--precision", choices.PRECISIONS),
        ("--optimizer", choices.OPTIMIZERS),
        ("--device", choices.DEVICES),
    ],
)
def test_completion_offers_every_word_in_every_command(flag: str, words: tuple[str, ...]) -> None:
    found = [(command, parameter) for command, parameter in _options() if flag in parameter.opts]
    assert found
    for command, parameter in found:
        offered = {item.value for item in parameter.shell_complete(None, "")}
        other = choices.EXPORTS if (command, flag) == ("export", "--to") else words  # a file, not a norm
        assert set(other) <= offered


def test_the_words_need_no_library() -> None:
    script = "import sys, normswap.choices; print(sorted({'torch', 'rich', 'typer'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"
