"""Which instructions of a module's code a run went through, and what the others could do with the layers in doubt.

A recorded run shows one way of a forward that does not trace. Whether another way uses a layer otherwise is in the
instructions that the run passed over. Where none of them gets at the layer, nor at a variable that has held the layer
or what it put out, the run has shown all that there is.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.attributes import leaves_of
from .calls import KnownModules
from .source_reading import ALL, uses_of
from .symbolic import Doubt

_TORCH = torch.__path__[0] + os.sep
# Code that others' modules are called from too, and the recorder's own.
_NOBODYS = (_TORCH, os.path.dirname(__file__) + os.sep, "<frozen")
# Ways to children that name none of them.
_WALKS = {
    "_modules", "modules", "children", "named_children", "named_modules", "get_submodule", "__dict__", "getattr",
    "vars", "state_dict", "parameters", "named_parameters", "get_parameter",
}  # fmt: skip
_LOCALS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_SUPER")
_STOPS = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "RAISE_VARARGS", "RERAISE"}
_ENDS = ("RAISE_VARARGS", "RERAISE")


class Execution:
    """Watches the code of the modules in doubt while a network runs, and says afterwards whose doubts are settled.

    doubts: what `Traced.doubtful` holds, by path.
    """

    def __init__(self, known: KnownModules, doubts: Mapping[str, Collection[Doubt]]) -> None:
        modules = known.modules
        self.doubts = {known.first_name.get(path, path): each for path, each in doubts.items()}
        self.owners = {doubt.owner: modules[doubt.owner] for each in doubts.values() for doubt in each}
        leaves = {path for path, each in self.doubts.items() if any(doubt.leaf for doubt in each)}
        # What a norm puts out may be used at will; where else it is called, by its name or a variable that held it.
        self.layers = {modules[path] for path in leaves if path not in known.norms}
        holders = {p for path in leaves for p in _above(path) if p not in self.owners}
        self._held = {id(modules[path]) for path in leaves | holders}
        self._watched = {code for owner in self.owners.values() for code in _codes_of(owner)}
        self._paths = {id(owner): path for path, owner in self.owners.items()}
        # By owner and code: two blocks of one class may go different ways.
        self._seen: dict[tuple[str, CodeType], set[int]] = defaultdict(set)
        self._names: dict[tuple[str, CodeType], set[str]] = defaultdict(set)
        self._at_jump: dict[tuple[str, CodeType], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._running: dict[FrameType, str] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def made(self, module: nn.Module, tensors: Collection[Tensor]) -> None:
        """Note what a layer in doubt has put out."""
        if module in self.layers:
            self._made |= {id(tensor): weakref.ref(tensor) for tensor in tensors}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, every instruction of the watched code counts as executed once a run went through it."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        path = self._owner_of(frame)
        if path is None:
            return None
        self._running[frame] = path
        self._seen[path, frame.f_code]  # entered
        frame.f_trace_opcodes = True
        return self._step

    def _owner_of(self, frame: FrameType) -> str | None:
        """The module in whose name code runs: whose method it is, or whose code has called it."""
        code = frame.f_code
        if code in self._watched and code.co_varnames:
            return self._paths.get(id(frame.f_locals.get(code.co_varnames[0])))
        if code.co_filename.startswith(_NOBODYS):
            return None
        return None if frame.f_back is None else self._running.get(frame.f_back)

    def _step(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        path, code = self._running.get(frame), frame.f_code
        if path is None:
            return self._step
        if event == "opcode":
            self._seen[path, code].add(frame.f_lasti)
            if frame.f_lasti in _jumps(code):
                self._at_jump[path, code][frame.f_lasti] |= self._sensitive(frame)
        elif event in ("line", "return"):
            self._names[path, code] |= self._sensitive(frame)
            if event == "return":
                del self._running[frame]
        return self._step

    def _sensitive(self, frame: FrameType) -> set[str]:
        """Variables that hold a layer in doubt, what holds it, or what it has put out."""
        return {name for name, value in frame.f_locals.items() if self._is_sensitive(value)}

    def _is_sensitive(self, value: Any) -> bool:
        whole = isinstance(value, (Tensor, nn.Module))
        return any(self._is_one(leaf) for leaf in ((value,) if whole else leaves_of(value)))

    def _is_one(self, value: Any) -> bool:
        made = self._made.get(id(value))
        return id(value) in self._held or (made is not None and made() is value)

    # --- afterwards

    def settled(self) -> set[str]:
        """Paths of the modules in doubt that no code which the run passed over gets at."""
        clear = {path for path in self.owners if self._is_clear(path)}
        return {path for path, doubts in self.doubts.items() if all(self._settles(d, clear) for d in doubts)}

    def _settles(self, doubt: Doubt, clear: set[str]) -> bool:
        """What is read stays in doubt; what is handed over whole is seen by the run, wherever the code is known."""
        if doubt.read:
            return False
        if doubt.leaf or not uses_of(self.owners[doubt.owner]).has_source:
            return doubt.owner in clear
        return self._entered(doubt.owner)

    def _entered(self, path: str) -> bool:
        owner = self.owners[path]
        forward = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
        return "forward" not in owner.__dict__ and (path, forward) in self._seen

    def _is_clear(self, path: str) -> bool:
        """Whether the run went through all code of an owner that gets at what is in doubt of it."""
        below = [p for p, doubts in self.doubts.items() if any(doubt.owner == path for doubt in doubts)]
        children = {p[len(path) :].lstrip(".").split(".")[0] for p in below}
        codes = {code for owner, code in self._seen if owner == path}
        return self._entered(path) and not any(self._reaches(path, code, children, codes) for code in codes)

    def _reaches(self, path: str, code: CodeType, children: set[str], ran: set[CodeType]) -> bool:
        """Whether what was passed over in some code gets at one of the children, or at what came of them."""
        done, owner = self._seen[path, code], self.owners[path]
        variables = self._passed_over(path, code)
        for step in _steps(code):
            if step.offset in done or step.argval is None:
                continue
            names = set(step.argval) if isinstance(step.argval, tuple) else {str(step.argval)}
            if step.opname.startswith(_LOCALS) and names & variables[step.offset]:
                return True
            if step.opname.startswith(_ATTRIBUTES) and (
                names & (children | _WALKS) or any(_method_reaches(owner, name, children) for name in names)
            ):
                return True
        inner = [const for const in code.co_consts if isinstance(const, CodeType) and const not in ran]
        return any(self._mentions(const, self._names[path, code] | children | _WALKS) for const in inner)

    def _passed_over(self, path: str, code: CodeType) -> dict[int, set[str]]:
        """By offset, variables that would be sensitive had the run come there: those that were where it parted.

        Where no jump leads, to a handler of exceptions, say, all that ever were.
        """
        done, ever = self._seen[path, code], self._names[path, code]
        follow = _successors(code)
        found: dict[int, set[str]] = {}
        for jump, names in self._at_jump[path, code].items():
            waiting, visited = [offset for offset in follow[jump] if offset not in done], set[int]()
            while waiting:
                offset = waiting.pop()
                visited.add(offset)
                found.setdefault(offset, set()).update(names)
                waiting += [after for after in follow[offset] if after not in done and after not in visited]
        return {offset: found.get(offset, ever) for offset in follow}

    def _mentions(self, code: CodeType, names: set[str]) -> bool:
        """Whether a function that was defined and never run names any of these."""
        found = {*code.co_names, *code.co_freevars}
        inner = [const for const in code.co_consts if isinstance(const, CodeType)]
        return bool(found & names) or any(self._mentions(const, names) for const in inner)


@functools.cache
def _jumps(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions that may go either way."""
    return frozenset(offset for offset, after in _successors(code).items() if len(after) > 1)


@functools.cache
def _successors(code: CodeType) -> dict[int, list[int]]:
    """By offset, the instructions that may come next."""
    steps = list(dis.get_instructions(code))
    found: dict[int, list[int]] = {}
    for step, after in itertools.zip_longest(steps, steps[1:]):
        goes_on = after is not None and step.opname not in _STOPS and not step.opname.startswith("RETURN")
        jumps = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
        found[step.offset] = [*([after.offset] if goes_on else []), *([step.argval] if jumps else [])]
    return found


def _above(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _codes_of(module: nn.Module) -> set[CodeType]:
    """The code of all methods of a module's class that are not torch's."""
    found = set()
    for base in type(module).__mro__:
        for value in vars(base).values() if base not in (nn.Module, object) else ():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if isinstance(function, FunctionType) and not function.__code__.co_filename.startswith(_TORCH):
                found.add(function.__code__)
    return found


def _method_reaches(owner: nn.Module, name: str, children: set[str]) -> bool:
    """Whether a method of the owner, which the run did not call here, gets at one of the children."""
    method: Any = getattr(type(owner), name, None)
    method = method.fget if isinstance(method, property) else method
    if not isinstance(method, FunctionType) or hasattr(nn.Module, name):
        return name in _WALKS
    uses = uses_of(owner, name)
    touched = uses.called | uses.iterated | uses.escaped | {child for child, _ in uses.read}
    return not uses.has_source or bool(touched & {*children, ALL})


def _steps(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions, without those that only lead to an exception."""
    block: list[dis.Instruction] = []
    for step in dis.get_instructions(code):
        if step.is_jump_target:
            yield from block
            block = []
        block.append(step)
        if step.opname in _ENDS:
            block = []
        elif "JUMP" in step.opname or step.opname.startswith(("RETURN", "FOR_ITER")):
            yield from block
            block = []
    yield from block
