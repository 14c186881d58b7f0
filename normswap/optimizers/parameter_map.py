"""What a conversion made of each parameter: its new name, what it was multiplied by, and where new ones belong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..conversion.apply import gamma_factor, scales_gamma, state_before
from ..conversion.exact_scaling import by_output_channel
from ..conversion.record import Record, record_of
from ..conversion.undo_record import Order
from ..errors import OptionError
from ..modules.gains import gain_name, gain_of
from ..modules.tree import module_at
from ..planning.plan import Step, Transfer

Names = tuple[dict[nn.Parameter, list[str]], nn.Module]
_REMAINDER = {"weight": "scale", "bias": "shift"}  # what is left of gamma and beta where a BN could not be fused


def converted(gn_model: nn.Module) -> tuple[nn.Module, Record]:
    """The converted network, without what wraps it (DistributedDataParallel, torch.compile), and its record."""
    bare: nn.Module | None = gn_model
    while bare is not None:
        if (record := record_of(bare)) is not None:
            return bare, record
        bare = _inner(bare)
    raise OptionError(
        "the second network was not made by normswap.convert or normswap.load",
        hint="remap_optimizer(optimizer, model, gn_model): first the original, then the converted one.",
    )


def _inner(model: nn.Module) -> nn.Module | None:
    name, child = next(iter(model._modules.items()), ("", None))
    return child if len(model._modules) == 1 and name in ("module", "_orig_mod") else None


def names_before(model: nn.Module, bare: nn.Module, record: Record, held: Container[Tensor]) -> Names:
    """The names that parameters had before the conversion, and the original without what wraps it.

    held: for a network converted in place that kept no record: a parameter of a changed layer is old if it is held.
    """
    path = record.plan.steps[0].path if record.plan.steps else ""
    while (inner := _inner(model)) is not None and not _has(model, path):
        model = inner
    pairs = list(model.named_parameters(remove_duplicate=False))
    if model is bare:
        pairs = [(name, p) for name, p in pairs if not _is_new(name, p, record, held)]
        gone = [(path, norm.module) for norm in record.undo.norms for path in norm.paths]
        pairs += [(_join(p, n), t) for p, m in gone for n, t in m.named_parameters(remove_duplicate=False)]
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in pairs:
        names[parameter].append(name)
    return names, model


def _is_new(name: str, parameter: nn.Parameter, record: Record, held: Container[Tensor]) -> bool:
    """Whether a conversion in place may have added a parameter; what it kept of a norm is found in its record."""
    path, _, own = name.rpartition(".")
    steps = record.plan.steps
    if own == "bias" and any(path in step.producers for step in steps):
        layers = {layer.path: layer for layer in record.undo.layers}
        return layers[path].bias is None if path in layers else parameter not in held
    of_norm = any(not s.path or name.startswith(f"{s.path}.") for s in steps)
    return of_norm and (bool(record.undo.norms) or parameter not in held)


def _has(model: nn.Module, path: str) -> bool:
    try:
        return module_at(model, path) is not None
    except KeyError:
        return False


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def records_since(model: nn.Module, bare: nn.Module, record: Record) -> list[Record]:
    """The conversions between the two networks, first to last; for one converted in place, the last."""
    chain = _history(record)
    known = len(chain) - 1 if model is bare else len(_history(record_of(model)))
    if known >= len(chain):
        raise OptionError("the second network was not converted from the first", hint="Check the order of the two.")
    return chain[known:]


def _history(record: Record | None) -> list[Record]:
    return [] if record is None else [*_history(record.previous), record]


# --- what became of each parameter ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a new parameter belongs: after the first of `beside` that is held, if `needed` is (None: needs nothing)."""

    beside: tuple[str, ...]
    needed: str | None = None


@dataclass
class Changes:
    """What became of each parameter of the original, from the records of the conversions between.

    target: new names by old parameter, None for those that are gone. factors: what a parameter was multiplied by,
    shaped to broadcast. orders: how its channels have been put in another order since. restart: new names whose state
    means nothing any more, and why.
    """

    old: dict[nn.Parameter, list[str]]
    new: dict[str, nn.Parameter]
    model: nn.Module
    records: list[Record]
    target: dict[nn.Parameter, str | None] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[str, list[Order]] = field(default_factory=dict)
    restart: dict[str, str] = field(default_factory=dict)
    added: dict[str, _Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {name for names in self.old.values() for name in names}
        self.steps = {step.path: step for record in self.records for step in record.plan.steps}
        for parameter, names in self.old.items():
            found = next((new for name in names for new in self._places(name) if new in self.new), None)
            self.target[parameter] = found
            if found is not None and self.new[found].shape != parameter.shape:
                self.restart[found] = "its shape changed"
        for record in self.records:
            self._scale_layers(record)
            for step in record.plan.steps:
                self._change_norm(step, record)
            for order in record.undo.orders:
                self._reorder(order)
        taken = {self.new[name] for name in self.target.values() if name is not None}
        for name, parameter in self.new.items():
            if parameter not in taken:
                taken.add(parameter)
                self.added[name] = self._place(name)

    def _places(self, name: str) -> Iterator[str]:
        """Where a parameter of the original may be now."""
        yield name
        for end in [0, *(i for i, letter in enumerate(name) if letter == ".")]:
            step = self.steps.get(name[:end])
            if step is not None:
                own = name[end:].removeprefix(".")
                yield _join(step.path, f"norm.{own}")
                if step.transfer in (Transfer.AFFINE, Transfer.ESTIMATE) and own in _REMAINDER:
                    yield from (_join(step.path, _REMAINDER[own]), _join(step.path, f"norm.{_REMAINDER[own]}"))
                bias = _join(step.producers[0], "bias") if len(step.producers) == 1 else ""
                if step.transfer.leaves_nothing and own == "bias" and bias not in self.known:
                    yield bias  # it is beta and a constant, so its gradient is beta's

    def _scale_layers(self, record: Record) -> None:
        """Weights, and biases that were there before, of the layers that a conversion folded into."""
        scales = {layer.path: layer.scale for layer in record.undo.layers}
        held = {name for name in self.target.values() if name is not None}
        for path in (p for s in record.plan.steps if s.transfer.edits_producer for p in s.producers):
            layer: Any = module_at(self.model, path)
            for own in (gain_name(layer) or "weight", "bias"):
                name = _join(path, own)
                if name not in held or (own == "bias" and name not in self.known):
                    continue
                if path not in scales:
                    self.restart[name] = "the conversion kept no record of what it folded"
                elif not bool(((scales[path] != 0) & scales[path].isfinite()).all()):
                    self.restart[name] = "some channel was folded with a scale of 0"
                else:
                    scale = scales[path].to(gain_of(layer).device)
                    self._scale(name, scale if own == "bias" else by_output_channel(layer, scale))

    def _change_norm(self, step: Step, record: Record) -> None:
        """Gamma and beta of a norm whose values the conversion changed."""
        for own in ("weight", "bias", *_REMAINDER.values()):
            for name in (_join(step.path, own), _join(step.path, f"norm.{own}")):
                if name not in self.new:
                    continue
                if own in _REMAINDER.values():
                    self.restart[name] = "it took over the statistics"
                elif step.transfer is Transfer.RESET:
                    self.restart[name] = "transfer='reset' set it anew"
                elif own == "weight" and step.zero_init:
                    self.restart[name] = "zero_init_residual set it to 0"
                elif own == "weight" and (step.unit or scales_gamma(step)):
                    self._scale_gamma(name, step, record)

    def _scale_gamma(self, name: str, step: Step, record: Record) -> None:
        norm = next((n for n in record.undo.norms if n.paths[0] == step.path), None)
        if (factor := gamma_factor(None if norm is None else state_before(norm), step)) is not None:
            self._scale(name, factor.to(self.new[name].device))

    def _reorder(self, order: Order) -> None:
        """Weight and bias of a layer or norm whose channels stand in another order, and what they were scaled by."""
        for own in ("weight", "bias", *(f"norm.{name}" for name in ("weight", "bias"))):
            name = _join(order.path, own)
            if name in self.new:
                self.orders.setdefault(name, []).append(order)
                factor = self.factors.get(name)
                if factor is not None and factor.dim() and order.rows is not None:
                    self.factors[name] = factor.index_select(0, order.rows.to(factor.device))

    def _scale(self, name: str, factor: Tensor) -> None:
        self.factors[name] = self.factors[name] * factor if name in self.factors else factor

    def _place(self, name: str) -> _Place:
        """A folded layer's bias: with beta, which it is most like, if its weight trains. Else: with its neighbours."""
        path, _, own = name.rpartition(".")
        fed = [step for step in self.steps.values() if path in step.producers]
        if fed and own == "bias":
            weight = _join(path, gain_name(module_at(self.model, path)) or "weight")
            betas = [n for step in fed for n in (_join(step.path, "bias"), _join(step.path, "norm.bias"))]
            return _Place((*betas, weight), needed=weight)
        taken = [s for s in self.steps.values() if any(reader.bias == name for reader in s.readers)]
        if taken:  # what a layer behind a norm has got of its beta
            weight = next(reader.weight for s in taken for reader in s.readers if reader.bias == name)
            return _Place((*(_join(s.path, "bias") for s in taken), weight), needed=weight)
        norm = next((s for s in self.steps.values() if path in (s.path, _join(s.path, "norm"))), None)
        parent = (norm.path if norm else path).rpartition(".")[0]
        names = list(self.new)
        position = names.index(name)
        order = (*reversed(names[:position]), *names[position:])
        near = [n for n in order if not parent or n.startswith(f"{parent}.")]
        return _Place((*(_join(p, "weight") for p in (norm.producers if norm else ())), *near))
