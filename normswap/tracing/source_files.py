"""The source of classes and functions, as syntax trees."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn

Method = tuple[ast.FunctionDef, Mapping[str, Any]]
"""A function's source, and the names of the module that it is defined in."""


def function_named(called: ast.expr, scope: Mapping[str, Any]) -> list[Method]:
    """The source of a function of the same package as what names it."""
    path: list[str] = []
    while isinstance(called, ast.Attribute):
        path.append(called.attr)
        called = called.value
    value = scope.get(called.id) if isinstance(called, ast.Name) else None
    for name in reversed(path):
        value = getattr(value, name, None)
    value = inspect.unwrap(value) if callable(value) else value
    package = str(scope.get("__name__")).partition(".")[0]
    if not isinstance(value, FunctionType) or value.__module__.partition(".")[0] != package:
        return []
    nodes = _functions_in(value.__code__.co_filename).get(value.__qualname__, [])
    return [(node, value.__globals__) for node in nodes]


@functools.cache
def _functions_in(path: str) -> dict[str, list[ast.FunctionDef]]:
    """Every function at the top of a source file, and every method of a class there, by its qualified name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    with contextlib.suppress(SyntaxError):
        for node in ast.parse("".join(linecache.getlines(path))).body:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            for each, prefix in ((node, ""), *((n, f"{getattr(node, 'name', '')}.") for n in inner)):
                if isinstance(each, ast.FunctionDef):
                    found.setdefault(prefix + each.name, []).append(each)
    return found


def is_one_of(function: object, nodes: list[ast.FunctionDef]) -> bool:
    """Whether a method is one of those read, and was not put on its class later."""
    function = function.fget if isinstance(function, property) else function
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    # A function's code begins at its first decorator.
    starts = {node.decorator_list[0].lineno if node.decorator_list else node.lineno for node in nodes}
    return code is not None and code.co_firstlineno in starts


def definitions_of(cls: type) -> list[ast.ClassDef]:
    """The source of a class; several where its name is defined more than once, none where there is no source."""
    try:
        path = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        return []
    return [] if path is None else _classes_in(path).get(cls.__qualname__, [])


@functools.cache
def _classes_in(path: str) -> dict[str, list[ast.ClassDef]]:
    """Every class of a source file by its qualified name. One parse serves all classes of a file."""
    found: dict[str, list[ast.ClassDef]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.setdefault(prefix + child.name, []).append(child)
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{prefix}{child.name}.<locals>.")
            else:
                visit(child, prefix)

    with contextlib.suppress(SyntaxError):
        visit(ast.parse("".join(linecache.getlines(path))), "")
    return found


def built_by(module: nn.Module) -> set[str]:
    """Attributes, true or false, by which the module's constructor has decided which children there are.

    With another value the module would have other children: what its code does then is not what this one will do.
    """
    cls: type = type(module)
    added = module._modules.keys() - _assigned(cls)
    return {
        name
        for name, children in _deciding(cls)
        if children & module._modules.keys() or (COMPUTED in children and added)
    } - {"training"}


COMPUTED = ""
"""Stands for a child under a name that the constructor computes."""


@functools.cache
def _deciding(cls: type) -> list[tuple[str, frozenset[str]]]:
    """Attributes that a constructor asks, `if self.name:` or `if name:`, each with the children made in that case."""
    found = []
    for asked in (n for init in _constructors(cls) for n in ast.walk(init) if isinstance(n, ast.If)):
        name = getattr(asked.test, "attr", getattr(asked.test, "id", None))
        if name is not None:
            found.append((str(name), frozenset(made for step in asked.body for made in _made_in(step))))
    return found


@functools.cache
def _assigned(cls: type) -> frozenset[str]:
    """The names under which constructors make children, as far as the source says them."""
    return frozenset(made for init in _constructors(cls) for made in _made_in(init))


def _constructors(cls: type) -> list[ast.FunctionDef]:
    bases = [] if cls.__module__.startswith("torch.nn.") else [base for base in cls.__mro__ if base is not object]
    nodes = [node for base in bases for definition in definitions_of(base) for node in definition.body]
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "__init__"]


def _made_in(step: ast.AST) -> set[str]:
    """Attributes that a part of a constructor sets, and children that it adds."""
    made = {n.attr for n in ast.walk(step) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(step):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("add_module", "register_module"):
            name = node.args[0] if node.args else None
            made.add(str(name.value) if isinstance(name, ast.Constant) else COMPUTED)
    return made
