"""How a module's code uses its children, read from the source: for modules whose forward cannot be run symbolically.

A child that is only ever called whole may be traced by itself. One whose inside is reached into (`self.block.conv(x)`,
`for block in self.blocks: block.conv(x)`), or that is handed to code not looked at here, is doubtful: what its layers
compute may be used elsewhere too.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .source_files import Method, definitions_of, function_named, is_one_of

ALL = "*"  # stands for every child
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Give back what they are given, or its members.
_PASS_ON = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "next", "sorted", "cast"}
_MEMBERS = {"items", "values", "children", "named_children"}
# Look at a module without running any part of it.
_HARMLESS = {"isinstance", "issubclass", "hasattr", "len", "type", "bool", "id", "str", "repr", "print", "callable"}


@dataclass
class Uses:
    """What the code of one class does with its children, by name (`*` for all of them).

    called: run whole. iterated: taken up without being run on the spot (iterated over, assigned). read: attribute
    names read from a child, or from what may be one. escaped: passed to code that is not looked at. has_source:
    whether there was source code to read.
    """

    called: set[str] = field(default_factory=set)
    iterated: set[str] = field(default_factory=set)
    read: set[tuple[str, str]] = field(default_factory=set)
    escaped: set[str] = field(default_factory=set)
    has_source: bool = True


def uses_of(module: nn.Module, entry: str = "forward") -> Uses:
    """How the module's forward, or another method, and the methods that it calls, use the module's children."""
    if isinstance(module, _CONTAINERS) and type(module).forward in {c.forward for c in _CONTAINERS}:
        return Uses()
    cls: type = type(module)
    return _uses_of_class(cls, entry)


def doubtful_below(
    module: nn.Module, uses: Uses, name: str, relevant: Callable[[nn.Module], bool]
) -> list[tuple[str, bool]]:
    """Paths from `module`, in its child `name`, of the modules whose insides may be used in ways no trace shows.

    Each with whether the code that was read reaches in; else it hands the module to code that was not.
    relevant: says which modules matter; a part without any of them can be reached into at will.
    """
    child = module._modules[name]
    if child is None:
        return []
    read = {attribute for owner, attribute in uses.read if owner in (name, ALL)}
    found = [(path, True) for path, part in _members(name, child) if any(_opens(part, a, relevant) for a in read)]
    if not uses.has_source or name in uses.escaped or ALL in uses.escaped:
        found.append((name, False))
    return found


def _members(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and, through plain containers, what is in it: iterating over a container yields its members."""
    yield path, module
    if isinstance(module, _CONTAINERS):
        for name, child in module._modules.items():
            if child is not None:
                yield from _members(f"{path}.{name}", child)


def _opens(module: nn.Module, attribute: str, relevant: Callable[[nn.Module], bool]) -> bool:
    """Whether reading an attribute of a module may lead to layers inside it, or to code other than its forward."""
    child = module._modules.get(attribute)
    if child is not None:
        return any(relevant(m) for m in nn.Module.modules(child))
    if attribute in ("forward", "__call__") or hasattr(nn.Module, attribute):
        return attribute in ("modules", "named_modules", "get_submodule")
    own = getattr(type(module), attribute, None)
    if isinstance(module, _CONTAINERS) or not (callable(own) or isinstance(own, property)):
        return False
    return _method_opens(module, attribute, relevant)


def _method_opens(module: nn.Module, method: str, relevant: Callable[[nn.Module], bool]) -> bool:
    """Whether a method, or property, gets at layers inside the module."""
    cls: type = type(module)
    uses = _uses_of_class(cls, method)
    for name, child in module._modules.items():
        if child is None or not any(relevant(m) for m in nn.Module.modules(child)):
            continue
        if not uses.has_source or (uses.called | uses.iterated | uses.escaped) & {name, ALL}:
            return True
        if doubtful_below(module, uses, name, relevant):
            return True
    return False


@functools.cache
def _uses_of_class(cls: type, entry: str = "forward") -> Uses:
    """What `entry` does, with the methods that it calls, and the functions of its package that it gives children to."""
    methods: dict[str, list[Method]] = {}
    for base in cls.__mro__:
        if base is object or base.__module__.startswith("torch.nn."):
            continue
        definitions = definitions_of(base)
        if not definitions:
            return Uses(has_source=False)
        for node in (n for definition in definitions for n in definition.body):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, []).append((node, vars(sys.modules[base.__module__])))
    uses = Uses(has_source=is_one_of(getattr(cls, entry, None), [node for node, _ in methods.get(entry, [])]))
    waiting: list[tuple[Method, dict[str, set[str]]]] = [(method, {}) for method in methods.get(entry, ())]
    seen = {entry, "forward"}  # a method that runs `self(x)` runs the whole, as anybody may
    given: set[tuple[int, str, str]] = set()
    while waiting:
        (node, scope), held = waiting.pop()
        reader = _Reader(node, uses, held)
        reader.run()
        new = (reader.own_names & methods.keys()) - seen
        waiting += [(method, {}) for name in new for method in methods[name]]
        seen |= new
        for call, argument, children in reader.handed:
            for method, parameter in _receivers(call, argument, reader, methods, scope):
                fresh = {child for child in children if (id(method[0]), parameter, child) not in given}
                given |= {(id(method[0]), parameter, child) for child in fresh}
                waiting += [(method, {parameter: fresh})] if fresh else []
    return uses


def _receivers(
    call: ast.Call, argument: ast.AST, reader: _Reader, methods: Mapping[str, list[Method]], scope: Mapping[str, Any]
) -> Iterator[tuple[Method, str]]:
    """The functions, of the class or of its package, that a call may mean, each with the parameter that an argument is.

    Another library's function cannot know what a network's parts are called: it runs them whole, or walks them all.
    """
    called = call.func
    own = isinstance(called, ast.Attribute) and reader.is_me(called.value)
    found = methods.get(called.attr, []) if own and isinstance(called, ast.Attribute) else function_named(called, scope)
    for node, names in found:
        parameters = [*node.args.posonlyargs, *node.args.args][int(own) :]
        if isinstance(argument, ast.keyword):
            named = [p.arg for p in (*parameters, *node.args.kwonlyargs) if p.arg == argument.arg]
        else:
            at = call.args.index(argument) if argument in call.args else len(parameters)
            named = [p.arg for p in parameters[at : at + 1]]
        yield from (((node, names), parameter) for parameter in named)


class _Reader:
    """Reads one method, following children through local variables.

    First it learns which variables may hold which children, then it goes through the method once more and notes what
    becomes of every expression that may be a child. It knows no order and no branches: a variable that is a child
    anywhere is one everywhere. So it can only see too much, and what it sees only makes fewer layers foldable.
    """

    def __init__(self, method: ast.FunctionDef, uses: Uses, held: Mapping[str, set[str]]) -> None:
        """held: what children the method's parameters may be."""
        self.method, self.uses = method, uses
        arguments = [*method.args.posonlyargs, *method.args.args]
        self.me = arguments[0].arg if arguments and arguments[0].arg not in held else ""
        self.held = {name: set(children) for name, children in held.items()}  # local variable -> children it may be
        self.handed: list[tuple[ast.Call, ast.AST, set[str]]] = []  # to which calls, as which argument
        # The tree tells what is inside a node; what a node is inside of says what becomes of its value.
        self.parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
        self.own_names = {node.attr for node in attributes if self.is_me(node.value) or self._is_super(node.value)}

    def run(self) -> None:
        # Variables are assigned from variables, in a loop also from later ones: each pass follows one step further,
        # until nothing is new. Eight are more than any code that was seen needs.
        for _ in range(8):
            before = {name: set(children) for name, children in self.held.items()}
            for node in ast.walk(self.method):
                self._bind(node)
            if self.held == before:
                break
        for node in ast.walk(self.method):
            children = self._children(node)
            parent = self.parents.get(node)
            # In `self.blocks[0](x)` three nodes may be the child: only the outermost, `self.blocks[0]`, is used.
            if children and parent is not None and not self._children(parent):
                self._note(node, parent, children)

    def is_me(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.me

    @staticmethod
    def _is_super(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"

    def _bind(self, node: ast.AST) -> None:
        """Let every variable that an assignment or a loop fills hold the children of its right-hand side."""
        targets: list[ast.AST] = []
        value: ast.AST | None = getattr(node, "value", None)
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            targets = [node.target]
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            targets, value = [node.target], node.iter
        if value is not None and targets and (children := self._children(value)):
            # `for i, (a, b) in ...`: which member goes to which name is not told apart, so each may be any of them.
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            for name in names:
                self.held.setdefault(name, set()).update(children)

    def _children(self, node: ast.AST) -> set[str]:
        """The children that an expression may evaluate to (or hold); empty for anything else."""
        # self.block; an attribute that is no child does no harm, since nothing is asked about it.
        if isinstance(node, ast.Attribute) and self.is_me(node.value):
            return {ALL} if node.attr == "_modules" else {node.attr}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            return {ALL} if self._is_iterated_self(node) else self.held.get(node.id, set())
        # What takes one out of several, or leaves it as it is.
        if isinstance(node, (ast.Subscript, ast.Starred, ast.NamedExpr)):
            return self._children(node.value)
        # What may be any of its parts.
        if isinstance(node, (ast.Tuple, ast.List)):
            return self._of_any(node.elts)
        if isinstance(node, ast.IfExp):
            return self._of_any([node.body, node.orelse])
        if isinstance(node, ast.BoolOp):
            return self._of_any(node.values)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            return self._children(node.elt)
        return self._of_call(node) if isinstance(node, ast.Call) else set()

    def _of_any(self, nodes: list[ast.expr]) -> set[str]:
        return set().union(*(self._children(node) for node in nodes))

    def _of_call(self, node: ast.Call) -> set[str]:
        """`getattr(self, name)`, `zip(self.a, self.b)`, `self.blocks.values()`; a call of a child gives no child."""
        if isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and len(node.args) > 1 and self.is_me(node.args[0]):
                name = node.args[1]
                return {str(name.value)} if isinstance(name, ast.Constant) else {ALL}
            return self._of_any(node.args) if node.func.id in _PASS_ON else set()
        if isinstance(node.func, ast.Attribute) and node.func.attr in _MEMBERS:
            return {ALL} if self.is_me(node.func.value) else self._children(node.func.value)
        return set()

    def _is_iterated_self(self, node: ast.Name) -> bool:
        """`for layer in self`, `self[0]`, `enumerate(self)`."""
        parent = self.parents.get(node)
        if node.id != self.me or parent is None:
            return False
        passed_on = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _PASS_ON
        return passed_on or (isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node) or (
            isinstance(parent, ast.Subscript) and parent.value is node
        )  # fmt: skip

    def _note(self, node: ast.AST, parent: ast.AST, children: set[str]) -> None:
        """What becomes of an expression that may be a child."""
        uses = self.uses
        if isinstance(parent, ast.Attribute):  # self.block.conv: reached into; self.block.forward(x): run whole
            uses.read |= {(child, parent.attr) for child in children}
            if parent.attr in ("forward", "__call__"):
                uses.called |= children
        elif isinstance(parent, ast.Call) and parent.func is node:  # self.block(x)
            uses.called |= children
        elif isinstance(parent, ast.Call):  # an argument of some other call
            name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
            if "checkpoint" in name:  # torch.utils.checkpoint.checkpoint(self.block, x) runs it
                uses.called |= children
            elif name == "getattr":
                attribute = parent.args[1] if len(parent.args) > 1 else None
                if isinstance(attribute, ast.Constant):
                    uses.read |= {(child, str(attribute.value)) for child in children}
                else:
                    uses.escaped |= children
            elif name not in _HARMLESS:
                uses.escaped |= children
                self.handed.append((parent, node, children))
        elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.For, ast.comprehension)):
            uses.iterated |= children
        elif isinstance(parent, ast.keyword) and isinstance(call := self.parents.get(parent), ast.Call):
            uses.escaped |= children
            self.handed.append((call, parent, children))
        # Questions such as `if self.down is not None` are harmless. Everything else, a return among it, lets it out.
        elif not isinstance(parent, (ast.Compare, ast.If, ast.IfExp, ast.While, ast.UnaryOp, ast.Assert, ast.Expr)):
            uses.escaped |= children
