"""A symbolic run of a network in every way that its code can go: by its flags, and by values that no such run knows.

One run shows one way. What another way uses is used all the same, once somebody sets the flag, passes the argument, or
gives the other data.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import CodeType
from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError

from ..modules.attributes import kept_by, reachable_from
from ..modules.restore import attributes_restored
from .between import hooked_between, is_identity
from .source_files import built_by

MOST = 16
"""Ways of one module that are tried; code that decides more often counts as not traceable."""
# What code raises on purpose where it refuses an input, or has no other way.
REFUSALS = (AssertionError, ValueError, RuntimeError, UnboundLocalError)


class Decisions:
    """What a symbolic run answers when code asks whether a value is true.

    The script first; then an argument's default, and yes for any other value.
    """

    def __init__(self, script: tuple[bool, ...]) -> None:
        self.taken = list(script)
        self.asked: dict[fx.Node, bool] = {}

    def answer(self, node: fx.Node) -> bool:
        """The answer for one value, which stays the same throughout a run."""
        if node not in self.asked:
            if len(self.asked) == len(self.taken):
                default = node.args[:1] if node.op == "placeholder" else ()
                self.taken.append(bool(default[0]) if default else True)
            if len(self.taken) > MOST:
                raise TraceError("too many decisions")
            self.asked[node] = self.taken[len(self.asked)]
        return self.asked[node]

    def others(self, script: tuple[bool, ...]) -> list[tuple[bool, ...]]:
        """Scripts of the ways that part from this one after its own script."""
        return [(*self.taken[:i], not self.taken[i]) for i in range(len(script), len(self.taken))]


def other_settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that the module's code reads, with another value each may take.

    `training`, and True and False, are turned round; a number or a word that the code compares with a constant gets a
    value for which the comparison turns out otherwise. A flag without which some child would not be there stays up.
    """
    cls: type = type(module)
    if cls.__module__.startswith("torch.nn."):
        return
    names, comparisons = _read_by(cls)
    for_life = built_by(module)
    for name in names:
        value = module.__dict__.get(name, getattr(cls, name, None))
        if type(value) is bool and not (value and name in for_life):
            yield name, not value
    for name, operation, constant in comparisons:
        value = module.__dict__.get(name, getattr(cls, name, None))
        if type(value) in (int, str) and (other := _otherwise(value, operation, constant)) is not None:
            yield name, other


def _otherwise(value: Any, operation: str, constant: Any) -> Any:
    """A value of the same type that compares otherwise; None where there is none, or no telling."""
    compare = _COMPARISONS[operation]
    near = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
    with suppress(TypeError):
        tried = [c for n in near if type(n) is type(value) for c in ((n, n + 1, n - 1) if type(n) is int else (n, ""))]
        return next((c for c in tried if compare(c, constant) != compare(value, constant)), None)
    return None


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "in": lambda value, constant: value in constant,
}  # fmt: skip


@contextmanager
def setting(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """With an attribute of the module set to a value, `training` in everything below it too."""
    holders = list(nn.Module.modules(module)) if name == "training" else [module]
    before = [(holder.__dict__, name in holder.__dict__, holder.__dict__.get(name)) for holder in holders]
    for table, _, _ in before:
        table[name] = value
    try:
        yield
    finally:
        for table, own, old in before:
            if own:
                table[name] = old
            else:
                table.pop(name, None)


@functools.cache
def _read_by(cls: type) -> tuple[tuple[str, ...], tuple[tuple[str, str, Any], ...]]:
    """Attributes that the methods of a class read, and what they compare with constants; setting it up left out."""
    names: dict[str, None] = {}
    comparisons: dict[tuple[str, str, Any], None] = {}
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for method in vars(base).values():
            function: Any = inspect.unwrap(method) if callable(method) else getattr(method, "fget", None)
            if inspect.isfunction(function) and function.__name__ not in ("__init__", "extra_repr", "__repr__"):
                _read_in(function.__code__, names, comparisons)
    known = set(vars(nn.Module)) - {"training"}
    return tuple(name for name in names if name not in known), tuple(comparisons)


def _read_in(code: CodeType, names: dict[str, None], comparisons: dict[tuple[str, str, Any], None]) -> None:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "COPY", "EXTENDED_ARG")]
    for step, then, last in zip(steps, steps[1:], [*steps[2:], steps[-1]], strict=False):
        if step.opname != "LOAD_ATTR":
            continue
        # Handed to a dropout, say, as its last argument, `training` leads to no other way.
        if step.argval != "training" or not then.opname.startswith(("CALL", "PRECALL", "KW_NAMES", "LOAD_CONST")):
            names[step.argval] = None
        if then.opname in ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_CONST_IMMORTAL"):
            operation = "in" if last.opname == "CONTAINS_OP" else re.sub(r"bool\((.*)\)", r"\1", last.argrepr)
            if last.opname in ("COMPARE_OP", "CONTAINS_OP") and operation in _COMPARISONS:
                comparisons[step.argval, operation, then.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _read_in(constant, names, comparisons)


Leaf = Callable[[nn.Module], bool]


class Tracer(fx.Tracer):
    """fx.Tracer that goes every way a module's code can go, and keeps a submodule it cannot trace as one opaque call.

    way_of: for each node, what would have to be otherwise for the code to get there; empty for the first way, which
    is the code as it stands. given: by way, what it alone returns, or keeps on a module. alike: values that
    stand for one another: all that a module is called on which is not run anew, all that one returns by its ways.
    made_by: the path of the innermost module that returns a value, where runs go into it.
    same: outputs of layers that another way returns, where the first returns an output of the same layer and of no
    other: who reads the one reads the other.
    """

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.leaf = leaf
        self.called: dict[str, str] = {}
        self.way_of: dict[fx.Node, str] = {}
        self.given: dict[str, set[fx.Node]] = {}
        self.alike: list[set[fx.Node]] = []
        self.same: set[fx.Node] = set()
        self.made_by: dict[fx.Node, str] = {}
        self._returned: dict[str, list[tuple[set[fx.Node], Any]]] = {}
        self._opaque: list[tuple[str, str]] = []
        self._way = ""
        self._decisions: list[Decisions] = []

    def untraced(self) -> list[str]:
        """Paths of the modules that did not trace; not where another way alone led to that."""
        return [path for path, way in self._opaque if not way or self.called[path]]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m) or (super().is_leaf_module(m, module_qualified_name) and not is_identity(m))

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        forward, values = super().create_args_for_root(*args, **kwargs)
        root: Any = self.root
        return lambda *given: self._every_way(root, lambda: forward(*given)), values

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.way_of[node] = self._way
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._decisions[-1].answer(obj.node)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.called[path] = min(self._way, self.called.get(path, self._way))
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        read = _nodes_in((args, kwargs))
        if self._way and path in self._returned:
            return self._again(path, read)
        last = self.graph._root._prev
        try:
            # not m(...): hooks are not made for symbols; `feeds` asks for them
            out = self._every_way(m, lambda: m.forward(*args, **kwargs))
        except Exception:  # a stranger's forward on symbolic values raises whatever it likes
            node = self.graph._root._prev
            while node is not last:
                previous = node._prev
                self.graph.erase_node(node)
                node = previous
            self._opaque.append((path, self._way))
            out = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.made_by.setdefault(out.node, path)
        if hooked_between(m, self.leaf):
            self._give(read | _nodes_in(out))
        if not self._way:
            self._returned.setdefault(path, []).append((read, _shallow(out)))
        return out

    def _again(self, path: str, read: set[fx.Node]) -> Any:
        """What a module returned when it was called the first way; it has gone its own other ways then.

        What it reads now and did not then is used; who calls it may read any of what it returned.
        """
        calls = self._returned[path]
        same = [out for before, out in calls if before == read]
        if not same:
            self.alike.append(read.union(*(before for before, _ in calls)))
            self._give(read.difference(*(before for before, _ in calls)))
            self._give(set().union(*(_nodes_in(out) for _, out in calls[:-1])))
        return _shallow(same[0] if same else calls[-1][1])

    def _every_way(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        """What the module returns as it is set, after its code was run with its other settings too."""
        out = self._either_way(module, run)
        if not self._way:
            for name, value in other_settings(module):
                # What it used until it failed, it used. That it fails says nothing: many a setting is for life.
                with suppress(Exception), setting(module, name, value), self._another(f"with {name}={value!r}", module):
                    self._gives(self._either_way(module, run), out)
        return out

    def _either_way(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        """What the code returns the first way that leads to an end; it goes both ways wherever it asks for a value."""
        outs: list[Any] = []
        waiting: list[tuple[bool, ...]] = [()]
        for _ in range(MOST):
            script = waiting.pop()
            decisions = Decisions(script)
            self._decisions.append(decisions)
            try:
                with self._another("on another branch of its code", module) if outs else nullcontext():
                    out = run()
                    if outs:
                        self._gives(out, outs[0])
                outs.append(out)
            except REFUSALS as error:
                if isinstance(error, TraceError) or not decisions.taken:
                    raise
            finally:
                self._decisions.pop()
            waiting += decisions.others(script)
            if not waiting:
                break
        if waiting or not outs:
            raise TraceError("no way leads to an end, or there are too many")
        return outs[0]

    @contextmanager
    def _another(self, way: str, module: nn.Module) -> Iterator[None]:
        """What is run here belongs to another way than the first; it leaves nothing behind on the modules."""
        before = self._way
        self._way = before or way
        try:
            with attributes_restored(module):
                try:
                    yield
                finally:
                    self._give(kept_on_modules(module))
        finally:
            self._way = before

    def _gives(self, value: Any, first: Any) -> None:
        """Note what a way returns and the first does not: whoever reads the one may read the other."""
        known = _nodes_in(first)
        if not known >= _nodes_in(value):
            self.alike.append(known | _nodes_in(value))
        layers = {node.target for node in known if node.op == "call_module"}
        others = _nodes_in(value) - known
        same = {n for n in others if n.op == "call_module" and n.target in layers}
        if sum(self.leaf(self.root.get_submodule(str(target))) for target in layers) == 1:
            self.same |= same  # outputs of two may swap places
        self._give(others - same)

    def _give(self, nodes: set[fx.Node]) -> None:
        self.given.setdefault(self._way, set()).update(nodes)


def _shallow(value: Any) -> Any:
    """A copy of a list or dict, which its reader may change."""
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def kept_on_modules(module: nn.Module) -> set[fx.Node]:
    """Values that the forward stored in an attribute of some module, where anybody may use them later."""
    return {value.node for value in kept_by(module) if isinstance(value, fx.Proxy)}


def _nodes_in(value: Any) -> set[fx.Node]:
    """The nodes of the symbolic values that a value holds."""
    return {leaf.node for leaf in reachable_from(value) if isinstance(leaf, fx.Proxy)}
