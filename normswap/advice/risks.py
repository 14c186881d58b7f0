"""What in a network may spoil a swap, read from its statistics, its layers and one run on noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.apply import FLOOR, QUIET
from ..conversion.preconditions import affine_moved, never_updated
from ..errors import plural
from ..inspection.inventory import Inventory, Layer
from ..modules.path_ranges import ROOT, collapse
from ..modules.precision import at_least_float32
from ..modules.restore import trial_run
from ..norms.registry import norm_named
from ..planning.plan import Plan, Step, Transfer

FEW = 64
"""Values of a group below which its mean and variance jump from sample to sample: the deviation of a mean over 64
independent values is an eighth of theirs."""


@dataclass(frozen=True)
class Risk:
    """Something to know before the swap. kind: one word for programs; layers: paths of those concerned, if any are."""

    kind: str
    text: str
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(run.name or ROOT for run in collapse(self.layers, str, lambda path: 0)[:4])
        return f"{self.text}{': ' if names else ''}{names}{', ...' if self._more else ''}"

    @property
    def _more(self) -> bool:
        return len(collapse(self.layers, str, lambda path: 0)) > 4

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"kind": self.kind, "text": self.text, "layers": list(self.layers)}


def risks_of(
    model: nn.Module,
    inventory: Inventory,
    plan: Plan | None,
    positions: Mapping[str, int],
    inputs: tuple[Tensor, ...] | None,
) -> Iterator[Risk]:
    """Everything found, the worst first.

    plan: the swap that is thought of, None where nothing is to be swapped. positions: of each layer's map.
    inputs: noise to run the network on, None where there is none.
    """
    yield from _statistics(inventory, follows=plan is not None and _follows(plan))
    if (path := None if inputs is None else coupled_at(model, inputs)) is not None:
        yield Risk("coupled", "the samples of a batch influence one another, whatever the norms are", (path or ROOT,))
    if inventory.suspects:
        yield Risk(
            "unknown",
            f"{plural(len(inventory.suspects), 'module')} that may normalize and that normswap does not know; kept",
            tuple(suspect.path for suspect in inventory.suspects),
        )
    if plan is not None:
        yield from _of_plan(plan, positions)


def _follows(plan: Plan) -> bool:
    """Whether some new norm follows the sample, so that channels of a group disturb one another."""
    return any(norm_named(step.target).per_sample for step in plan.steps)


def _statistics(inventory: Inventory, *, follows: bool) -> Iterator[Risk]:
    layers = [x for x in inventory.layers if x.state.has_statistics and not x.state.statistics[0].is_meta]
    states = [layer.state for layer in layers]
    if never_updated(states):
        trained = ", though the network was trained" if affine_moved(states) else ""
        yield Risk(
            "never updated", f"the running statistics were never updated: mean 0, variance 1 in all norms{trained}"
        )
        return
    if not follows:
        return
    quiet, dead = _counted(layers, _quiet), _counted(layers, _dead)
    if dead:
        what = f"{_channels(dead, layers)} dead (γ 0, or σ² below ε/1000): what they do on other images is not known"
        yield Risk("dead", what, tuple(dead))
    if quiet:
        what = f"{_channels(quiet, layers)} quiet (σ² below {QUIET:g} ε); copying γ and β drowns them"
        yield Risk("quiet", what, tuple(quiet))


def _quiet(layer: Layer) -> Tensor:
    var = at_least_float32(layer.state.statistics[1])
    return (var < QUIET * layer.state.eps) & (var > FLOOR * layer.state.eps) & ~_dead(layer)


def _dead(layer: Layer) -> Tensor:
    silent = at_least_float32(layer.state.statistics[1]) <= FLOOR * layer.state.eps
    return silent if layer.state.weight is None else silent | (layer.state.weight.detach() == 0)


def _counted(layers: Sequence[Layer], which: Any) -> dict[str, int]:
    counts = {layer.path: int(which(layer).sum()) for layer in layers}
    return {path: count for path, count in counts.items() if count}


def _channels(counts: Mapping[str, int], layers: Sequence[Layer]) -> str:
    total = sum(layer.state.channels for layer in layers)
    return f"{sum(counts.values())} of {total} channels are"


def _of_plan(plan: Plan, positions: Mapping[str, int]) -> Iterator[Risk]:
    sizes = {step.path: values_per_group(step, positions.get(step.path)) for step in plan.steps}
    few = {path: size for path, size in sizes.items() if size is not None and size < FEW}
    if few:
        yield Risk("few values", f"groups of {min(few.values())} values, fewer than {FEW}", tuple(few))
    prescaled = tuple(step.path for step in plan.steps if step.transfer is Transfer.PRESCALE)
    if prescaled:
        share = f"{len(prescaled)} of {plural(len(plan.steps), 'layer')}"
        yield Risk("prescaled", f"{share} can only be prescaled, which costs a multiplication at run time", prescaled)


def values_per_group(step: Step, positions: int | None) -> int | None:
    """How many values one statistic of the new norm is taken over; None where it takes none, or nobody knows."""
    target = norm_named(step.target)
    if target.elements is None or not target.per_sample or positions is None:
        return None
    return target.elements(step.channels, positions, step.options)


def coupled_at(model: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
    """The path of the module in which one sample of a batch influences another; None where none does. In eval mode.

    Runs the network on two pairs of samples with the same first one: a module whose inputs agree on the first sample
    while its output does not is where they meet, such as by a mean over the batch.
    """
    pairs = [tuple(x[[0, other]] for x in inputs) for other in (1, 2)]
    names = {module: path for path, module in model.named_modules()}
    firsts: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    culprits: list[str] = []

    def run(pair: tuple[Tensor, ...], again: bool) -> None:
        calls: dict[str, int] = {}

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            path = names[module]
            call = calls[path] = calls.get(path, 0) + 1
            here = _first_samples((args, kwargs)), _first_samples(out)
            if not again:
                firsts[path, call] = here
            elif not culprits and (before := firsts.get((path, call))) is not None and _meet(before, here):
                culprits.append(path)

        with ExitStack() as stack, trial_run(model):
            for module in names:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            model(*pair)

    for i, pair in enumerate(pairs):
        run(pair, again=i == 1)
    return culprits[0] if culprits else None


def _meet(one: tuple[list[Tensor], list[Tensor]], other: tuple[list[Tensor], list[Tensor]]) -> bool:
    """Whether the first sample goes in as before and comes out another."""
    return _equal(one[0], other[0]) and not _equal(one[1], other[1])


def _first_samples(tree: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf[0].detach().clone() for leaf in leaves if leaf.dim() > 0 and len(leaf) == 2]


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """To rounding."""
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4 * _size(a)) for a, b in pairs
    )


def _size(x: Tensor) -> float:
    return float(x.float().abs().max()) if x.numel() else 0.0
