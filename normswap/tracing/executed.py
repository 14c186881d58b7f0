"""Which instructions of a module's code a run went through, and what the others could do with the layers in doubt.

A recorded run shows one way of a forward that does not trace. Whether another way uses a layer otherwise is in the
instructions that the run passed over. Where none of them gets at the layer, nor at a variable that has held the layer
or what it put out, the run has shown all that there is.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from .calls import KnownModules
from .followed import ATTRIBUTES, WALKS, Followed, mentions, steps_of, variables_read
from .source_reading import ALL, uses_of
from .symbolic import Doubt


class Execution:
    """Watches the code of the modules in doubt while a network runs, and says afterwards whose doubts are settled.

    doubts: what `Traced.doubtful` holds, by path.
    """

    def __init__(self, known: KnownModules, doubts: Mapping[str, Collection[Doubt]]) -> None:
        modules, first = known.modules, known.first_name
        self.doubts = {
            first[path]: [replace(doubt, owner=first[doubt.owner]) for doubt in each]
            for path, each in doubts.items()
            if first.keys() >= {path, *(doubt.owner for doubt in each)}  # not one of a module within itself
        }
        self.owners = {doubt.owner: modules[doubt.owner] for each in self.doubts.values() for doubt in each}
        leaves = {path for path, each in self.doubts.items() if any(doubt.leaf for doubt in each)}
        # What a norm puts out may be used at will; where else it is called, by its name or a variable that held it.
        self.layers = {modules[path] for path in leaves if path not in known.norms}
        holders = {p for path in leaves for p in _above(path) if p not in self.owners}
        self._held = {id(modules[path]) for path in leaves | holders}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self.followed = Followed(self.owners, self._is_one)

    def made(self, module: nn.Module, tensors: Collection[Tensor]) -> None:
        """Note what a layer in doubt has put out."""
        if module in self.layers:
            self._made |= {id(tensor): weakref.ref(tensor) for tensor in tensors}

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
        return self.followed.entered(doubt.owner)

    def _is_clear(self, path: str) -> bool:
        """Whether the run went through all code of an owner that gets at what is in doubt of it."""
        below = [p for p, doubts in self.doubts.items() if any(doubt.owner == path for doubt in doubts)]
        children = {p[len(path) :].lstrip(".").split(".")[0] for p in below}
        codes = self.followed.codes(path)
        return self.followed.entered(path) and not any(self._reaches(path, code, children, codes) for code in codes)

    def _reaches(self, path: str, code: CodeType, children: set[str], ran: set[CodeType]) -> bool:
        """Whether what was passed over in some code gets at one of the children, or at what came of them."""
        done, owner = self.followed.seen[path, code], self.owners[path]
        variables = self.followed.variables(path, code)
        for step in steps_of(code):
            if step.offset in done or step.argval is None:
                continue
            if variables_read(step) & variables[step.offset]:
                return True
            names = set(step.argval) if isinstance(step.argval, tuple) else {str(step.argval)}
            if step.opname.startswith(ATTRIBUTES) and (
                names & (children | WALKS) or any(_method_reaches(owner, name, children) for name in names)
            ):
                return True
        inner = [const for const in code.co_consts if isinstance(const, CodeType) and const not in ran]
        return any(mentions(const, self.followed.names[path, code] | children | WALKS) for const in inner)


def _above(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _method_reaches(owner: nn.Module, name: str, children: set[str]) -> bool:
    """Whether a method of the owner, which the run did not call here, gets at one of the children."""
    method: Any = getattr(type(owner), name, None)
    method = method.fget if isinstance(method, property) else method
    if not isinstance(method, FunctionType) or hasattr(nn.Module, name):
        return name in WALKS
    uses = uses_of(owner, name)
    touched = uses.called | uses.iterated | uses.escaped | {child for child, _ in uses.read}
    return not uses.has_source or bool(touched & {*children, ALL})
