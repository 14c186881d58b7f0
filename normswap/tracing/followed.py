"""Follows the code of modules instruction by instruction while they run, and knows what was passed over."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.attributes import leaves_of

# Where the instructions are known; elsewhere nothing counts as run, and so every doubt stays.
KNOWN = ("cpython", {(3, 10), (3, 11), (3, 12), (3, 13), (3, 14)})

_TORCH = torch.__path__[0] + os.sep
# Code that others' modules are called from too, and the recorder's own.
_NOBODYS = (_TORCH, os.path.dirname(__file__) + os.sep, "<frozen")
LOCALS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF", "LOAD_NAME", "LOAD_FROM_DICT_OR")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_SUPER")
# Ways to what a module holds that name none of it.
WALKS = {
    "_modules", "_parameters", "modules", "children", "named_children", "named_modules", "get_submodule", "__dict__",
    "getattr", "vars", "state_dict", "parameters", "named_parameters", "get_parameter",
}  # fmt: skip
_STOPS = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "RAISE_VARARGS", "RERAISE"}
_ENDS = ("RAISE_VARARGS", "RERAISE")


class Followed:
    """The code of some modules, followed while they run.

    owners: the modules by their paths. sensitive: whether a value, a tensor or module, is one that counts.
    seen: by owner and code, the offsets that ran, since two blocks of one class may go different ways. names: likewise,
    the variables that ever held what is sensitive.
    """

    def __init__(self, owners: Mapping[str, nn.Module], sensitive: Callable[[Any], bool]) -> None:
        self.owners, self._is_one = owners, sensitive
        self._watched = {code for owner in owners.values() for code in codes_of(owner)}
        self._paths = {id(owner): path for path, owner in owners.items()}
        self.seen: dict[tuple[str, CodeType], set[int]] = defaultdict(set)
        self.names: dict[tuple[str, CodeType], set[str]] = defaultdict(set)
        self._at_jump: dict[tuple[str, CodeType], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._running: dict[FrameType, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, every instruction of the watched code counts as executed once a run went through it.

        On a Python whose instructions are not known nothing is watched, and no module counts as entered.
        """
        if not known_here():
            yield
            return
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
        self.seen[path, frame.f_code]  # entered
        frame.f_trace = (
            self._step
        )  # 3.13 heeds the next line only where this is set, 3.12 only where tracing is set anew
        frame.f_trace_opcodes = True
        sys.settrace(sys.gettrace())
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
            self.seen[path, code].add(frame.f_lasti)
            if frame.f_lasti in _jumps(code):
                self._at_jump[path, code][frame.f_lasti] |= self._sensitive(frame)
        elif event in ("line", "return"):
            self.names[path, code] |= self._sensitive(frame)
            if event == "return":
                del self._running[frame]
        return self._step

    def _sensitive(self, frame: FrameType) -> set[str]:
        """Variables that hold a layer in doubt, what holds it, or what it has put out."""
        return {name for name, value in frame.f_locals.items() if self._is_sensitive(value)}

    def _is_sensitive(self, value: Any) -> bool:
        whole = isinstance(value, (Tensor, nn.Module))
        return any(self._is_one(leaf) for leaf in ((value,) if whole else leaves_of(value)))

    def entered(self, path: str) -> bool:
        """Whether the forward of a module's class has run for it."""
        owner = self.owners[path]
        forward = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
        return "forward" not in owner.__dict__ and (path, forward) in self.seen

    def codes(self, path: str) -> set[CodeType]:
        """All code that ran in the name of a module."""
        return {code for owner, code in self.seen if owner == path}

    def variables(self, path: str, code: CodeType) -> dict[int, set[str]]:
        """By offset, variables that would be sensitive had the run come there: those that were where it parted.

        Where no jump leads, to a handler of exceptions, say, all that ever were.
        """
        done, ever = self.seen[path, code], self.names[path, code]
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


def known_here() -> bool:
    """Whether the instructions of the running Python are known."""
    implementation, versions = KNOWN
    return sys.implementation.name == implementation and sys.version_info[:2] in versions


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


def codes_of(module: nn.Module) -> set[CodeType]:
    """The code of all methods of a module's class that are not torch's."""
    found = set()
    for base in type(module).__mro__:
        for value in vars(base).values() if base not in (nn.Module, object) else ():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if isinstance(function, FunctionType) and not function.__code__.co_filename.startswith(_TORCH):
                found.add(function.__code__)
    return found


def steps_of(code: CodeType) -> Iterator[dis.Instruction]:
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


def variables_read(step: dis.Instruction) -> set[str]:
    """Names of the variables that an instruction reads."""
    if step.opname.startswith(LOCALS):
        return set(step.argval) if isinstance(step.argval, tuple) else {str(step.argval)}
    return {step.argval[1]} if step.opname == "STORE_FAST_LOAD_FAST" else set()  # 3.13 reads and writes in one


def mentions(code: CodeType, names: set[str]) -> bool:
    """Whether a function that was defined and never run names any of these."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return bool({*code.co_names, *code.co_freevars} & names) or any(mentions(const, names) for const in inner)
