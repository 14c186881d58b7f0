"""Let an optimizer that was built before a conversion go on with the converted network."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..conversion.exact_scaling import scaled
from ..conversion.record import Record
from ..conversion.undo_record import Order, ordered
from ..errors import Fix, OptionError, Text
from ..norms.registry import norm_named
from .parameter_map import Changes, converted, names_before, records_since

# How an entry of the state grows with the gradient: momentum with its first power, second moments with its square,
# the rest not at all.
_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "step": 0}
_POWERS: dict[type[Optimizer], dict[str, int]] = {
    torch.optim.SGD: {"momentum_buffer": 1},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: {**_ADAM, "mu_product": 0},
    torch.optim.RAdam: _ADAM,
    torch.optim.Adamax: {"exp_avg": 1, "exp_inf": 1, "step": 0},
    torch.optim.Adagrad: {"sum": 2, "step": 0},
    torch.optim.RMSprop: {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0, "step": 0},
}
_DONE: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Record]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class RemapReport:
    """The result of `remap_optimizer`: names of parameters in the converted network, removed ones in the original.

    kept: go on with their state as it was. rescaled: their weights were, or stand in another order since `calibrate`,
    and so does their state. restarted: still trained, but without their state. added: new parameters. left_out: new
    parameters that train, but whose neighbours the optimizer did not hold. notes: why states were not carried over,
    and groups that are empty now.
    """

    kept: tuple[str, ...] = ()
    rescaled: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: list(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        counts = [f"{len(names)} {what}" for what, names in asdict(self).items() if names and what != "notes"]
        left_out = [f"not held: {name}" for name in self.left_out]
        return "\n".join([f"parameters: {', '.join(counts).replace('_', ' ')}", *left_out, *self.notes])


def remap_optimizer(optimizer: Optimizer | Iterable[Optimizer], model: nn.Module, gn_model: nn.Module) -> RemapReport:
    """Change an optimizer of `model`, or several, in place, so that it trains `gn_model`, which was converted from it.

    Every parameter gives its place to the one at the same path; groups, their order and options stay, so a learning
    rate scheduler built on the optimizer goes on. A group that becomes empty stays too. A bias that folding added
    goes to the group of the norm's beta, or of its layer's weight; gamma and beta that were buffers to that of the
    layers beside them. What the optimizer did not hold stays out; what is not of `model` stays in.

    State is kept. Where a weight became `W' = W * scale`, its gradient became `1 / scale` times what it was, and so
    does its momentum; a second moment becomes `1 / scale**2` times (SGD, the Adam family, Adagrad, RMSprop; the
    state of others starts anew for such weights). gn_model may be `model` itself, converted in place: then call this
    once, after each conversion.

    Raises OptionError, with nothing changed: for a network that was not converted, an optimizer that holds nothing
    of `model` or was remapped already, LBFGS (its history mixes all parameters), or when nothing is left to train.
    """
    optimizers = _several(optimizer)
    bare, record = converted(gn_model)
    held = {p for each in optimizers for group in each.param_groups for p in group["params"]}
    names, original = names_before(model, bare, record, held)
    records = records_since(original, bare, record)
    changes = Changes(names, dict(bare.named_parameters(remove_duplicate=False)), bare, records)
    for each in optimizers:
        _check(each, changes, record)
    placed: set[nn.Parameter] = set()
    results = [_Remapped(each, changes, placed) for each in optimizers]
    for result in results:
        result.apply()
        _DONE[result.optimizer] = weakref.ref(record)
    if original is bare:
        for name in (*changes.factors, *changes.orders):
            changes.new[name].grad = None  # it belongs to the weight before it was scaled or reordered
    return _report(results, changes)


# --- one optimizer --------------------------------------------------------------------------------------------------


class _Remapped:
    """What one optimizer is to hold; nothing of it is changed before `apply`."""

    def __init__(self, optimizer: Optimizer, changes: Changes, placed: set[nn.Parameter]) -> None:
        """placed: what the optimizers before this one hold; what this one holds is added."""
        self.optimizer, self.changes = optimizer, changes
        self.groups: list[list[tuple[nn.Parameter, str | None]]] = []
        self.state: dict[Any, Any] = {}
        self.names: dict[str, list[str]] = {what: [] for what in ("kept", "rescaled", "restarted", "added", "removed")}
        self.reasons: dict[str, list[str]] = defaultdict(list)
        seen = {p for group in optimizer.param_groups for p in group["params"] if p not in changes.target}
        for group in optimizer.param_groups:
            self.groups.append(list(self._members(group, seen)))
        placed |= seen
        self._add(placed)
        self.notes = [
            f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} without state: {reason}"
            for reason, names in self.reasons.items()
        ]
        self.notes += [f"group {i} has no parameters now" for i, group in enumerate(self.groups) if not group]
        if not any(self.groups):
            raise OptionError("none of the parameters that the optimizer holds trains in the converted network")

    def _members(self, group: dict[str, Any], seen: set[nn.Parameter]) -> Iterator[tuple[nn.Parameter, str | None]]:
        names = group.get("param_names", [None] * len(group["params"]))
        for old, name in zip(group["params"], names, strict=True):
            new_name = self.changes.target.get(old)
            if old not in self.changes.target:
                yield old, name
                self._give(old, self.optimizer.state.get(old))
            elif new_name is None:
                self.names["removed"].append(self.changes.old[old][0])
            elif (new := self.changes.new[new_name]) not in seen:
                seen.add(new)
                yield new, name if name is None or new_name in self.changes.old[old] else new_name
                self._give(new, self._state(old, new, new_name))

    def _give(self, parameter: nn.Parameter, state: Any) -> None:
        if state is not None:
            self.state[parameter] = state

    def _state(self, old: nn.Parameter, new: nn.Parameter, name: str) -> Any:
        """The state of the parameter that takes another's place; None if that one's means nothing for it."""
        state, factor = self.optimizer.state.get(old), self.changes.factors.get(name)
        reason, orders = self.changes.restart.get(name), self.changes.orders.get(name, [])
        if state and orders and reason is None:
            odd = [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and v.shape != new.shape]
            if odd:
                reason = f"{type(self.optimizer).__name__}'s {odd[0]} does not say which channel is which"
            state = {key: _reordered(value, new, orders) for key, value in state.items()}
        if state and reason is None and factor is not None:
            powers = self._powers()
            unknown = [key for key, value in state.items() if isinstance(value, Tensor) and key not in powers]
            if unknown:
                reason = f"how {type(self.optimizer).__name__}'s {unknown[0]} scales is not known"
            else:
                state = {key: _scaled(value, factor, powers.get(key, 0)) for key, value in state.items()}
        if reason is not None:
            self.names["restarted"].append(name)
            self.reasons[reason].append(name)
            return None
        self.names["kept" if factor is None and not orders else "rescaled"].append(name)
        return None if state is None else {key: _beside(value, new) for key, value in state.items()}

    def _powers(self) -> dict[str, int]:
        optimizer: Any = self.optimizer
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper
            optimizer = inner
        return next((_POWERS[cls] for cls in type(optimizer).__mro__ if cls in _POWERS), {})

    def _add(self, placed: set[nn.Parameter]) -> None:
        where = {p: group for group in self.groups for p, _ in group}
        for name, place in self.changes.added.items():
            parameter = self.changes.new[name]
            needed = place.needed is None or self.changes.new.get(place.needed) in where
            held = (self.changes.new[n] for n in place.beside if n in self.changes.new)
            anchor = next((p for p in held if p in where), None)
            if parameter in placed or not needed or anchor is None or not parameter.requires_grad:
                continue
            group = where[parameter] = where[anchor]
            position = next(i for i, (p, _) in enumerate(group) if p is anchor)
            group.insert(position + 1, (parameter, name))
            placed.add(parameter)
            self.names["added"].append(name)

    def apply(self) -> None:
        """Change the optimizer: its own lists and tables, which schedulers and wrappers may hold."""
        for group, members in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = [parameter for parameter, _ in members]
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in members]
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _scaled(value: Any, factor: Tensor, power: int) -> Any:
    return scaled(value, factor.to(value.device) ** -power) if power and isinstance(value, Tensor) else value


def _reordered(value: Any, parameter: nn.Parameter, orders: list[Order]) -> Any:
    """A state of the parameter's shape, with the channels in the order that they have now."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        for order in orders:
            value = ordered(value, order)
    return value


def _beside(value: Any, parameter: nn.Parameter) -> Any:
    """A state of the parameter's shape on its device; counters stay where they are."""
    moves = isinstance(value, Tensor) and value.shape == parameter.shape
    return value.to(parameter.device) if moves else value


def _several(optimizer: Any) -> list[Optimizer]:
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    wrong = next((each for each in optimizers if not isinstance(each, Optimizer)), None)
    if wrong is not None or not optimizers:
        what = "none" if wrong is None else f"a {type(wrong).__name__}"
        raise OptionError(f"expected a torch.optim.Optimizer or several, got {what}")
    return optimizers


def _check(optimizer: Optimizer, changes: Changes, record: Record) -> None:
    if isinstance(optimizer, LBFGS):
        raise OptionError(
            "the history of LBFGS mixes all parameters and cannot be remapped",
            hint="Build a new one: LBFGS(gn_model.parameters()).",
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    done = _DONE.get(optimizer)
    if (done is not None and done() is record) or not held.isdisjoint(changes.new[name] for name in changes.added):
        raise OptionError("this optimizer trains the converted network already", hint="Remap it once.")
    if held.isdisjoint(changes.target):
        raise OptionError(
            f"this {type(optimizer).__name__} holds no parameter of the original network",
            hint="remap_optimizer(optimizer, model, gn_model): model is the network that the optimizer was built for.",
        )
    in_place = not held.isdisjoint(changes.new.values())
    gone = any(norm_named(s.target).fixed for s in changes.steps.values())
    if in_place and gone and not record.undo.norms and not held <= set(changes.target):
        raise OptionError(
            "which parameters the conversion removed is not known, since it was made in place and kept no record",
            hint=Text("Convert with ", Fix("undo", True), ", or not in place."),
        )


def _report(results: list[_Remapped], changes: Changes) -> RemapReport:
    lists = {what: tuple(n for r in results for n in r.names[what]) for what in results[0].names}
    trained = (name for name in changes.added if changes.new[name].requires_grad)
    left_out = tuple(name for name in trained if name not in lists["added"])
    return RemapReport(**lists, left_out=left_out, notes=tuple(note for r in results for note in r.notes))
