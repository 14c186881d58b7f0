"""How a module's code uses its children, read from the source: for modules whose forward cannot be run symbolically.

A child that is only ever called whole may be traced by itself. One whose inside is reached into (`self.block.conv(x)`,
`for block in self.blocks: block.conv(x)`), or that is handed to code not looked at here, is doubtful: what its layers
compute may be used elsewhere too.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

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


def uses_of(module: nn.Module) -> Uses:
    """How the module's forward, and the methods that it calls, use the module's children."""
    if isinstance(module, _CONTAINERS) and type(module).forward in {c.forward for c in _CONTAINERS}:
        return Uses()
    cls: type = type(module)
    return _uses_of_class(cls)


def doubtful_below(module: nn.Module, uses: Uses, name: str, relevant: Callable[[nn.Module], bool]) -> list[str]:
    """Paths from `module`, in its child `name`, of the modules whose insides may be used in ways no trace shows.

    relevant: says which modules matter; a part without any of them can be reached into at will.
    """
    child = module._modules[name]
    if child is None:
        return []
    if not uses.has_source or name in uses.escaped or ALL in uses.escaped:
        return [name]
    read = {attribute for owner, attribute in uses.read if owner in (name, ALL)}
    return [path for path, part in _members(name, child) if any(_opens(part, a, relevant) for a in read)]


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
    """What `entry` and the methods that it calls do."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in cls.__mro__:
        if base is object or base.__module__.startswith("torch.nn."):
            continue
        definitions = definitions_of(base)
        if not definitions:
            return Uses(has_source=False)
        for node in (n for definition in definitions for n in definition.body):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, []).append(node)
    uses = Uses(has_source=_is_one_of(getattr(cls, entry, None), methods.get(entry, [])))
    waiting, seen = [entry], {entry}
    while waiting:
        for method in methods.get(waiting.pop(), ()):
            reader = _Reader(method, uses)
            reader.run()
            new = reader.own_names & methods.keys() - seen
            waiting += new
            seen |= new
    return uses


def _is_one_of(function: object, nodes: list[ast.FunctionDef]) -> bool:
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


class _Reader:
    """Reads one method, following children through local variables.

    First it learns which variables may hold which children, then it goes through the method once more and notes what
    becomes of every expression that may be a child. It knows no order and no branches: a variable that is a child
    anywhere is one everywhere. So it can only see too much, and what it sees only makes fewer layers foldable.
    """

    def __init__(self, method: ast.FunctionDef, uses: Uses) -> None:
        self.method, self.uses = method, uses
        arguments = [*method.args.posonlyargs, *method.args.args]
        self.me = arguments[0].arg if arguments else ""
        self.held: dict[str, set[str]] = {}  # local variable -> children it may be
        # The tree tells what is inside a node; what a node is inside of says what becomes of its value.
        self.parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
        self.own_names = {node.attr for node in attributes if self._is_me(node.value) or self._is_super(node.value)}

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

    def _is_me(self, node: ast.AST) -> bool:
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
        if isinstance(node, ast.Attribute) and self._is_me(node.value):
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
            if node.func.id == "getattr" and len(node.args) > 1 and self._is_me(node.args[0]):
                name = node.args[1]
                return {str(name.value)} if isinstance(name, ast.Constant) else {ALL}
            return self._of_any(node.args) if node.func.id in _PASS_ON else set()
        if isinstance(node.func, ast.Attribute) and node.func.attr in _MEMBERS:
            return {ALL} if self._is_me(node.func.value) else self._children(node.func.value)
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
        elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.For, ast.comprehension)):
            uses.iterated |= children
        # Questions such as `if self.down is not None` are harmless. Everything else, a return among it, lets it out.
        elif not isinstance(parent, (ast.Compare, ast.If, ast.IfExp, ast.While, ast.UnaryOp, ast.Assert, ast.Expr)):
            uses.escaped |= children
