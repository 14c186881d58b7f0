"""Prove a conversion: with every new norm replaced by its bare per-channel map, the network must be the original.

Folding and prescaling make each norm's input have mean 0 and variance 1 by the BN's own statistics. If every edge was
right, `weight * x + bias` in the norm's place then computes what the BN computed, exactly up to rounding. A wrong edge
changes every value after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..inspection.example_inputs import shrink_images
from ..modules.restore import evaluating, seed_everything, undisturbed
from ..modules.tree import module_at
from ..norms._wrappers import per_channel
from ..planning.plan import Plan, Step
from .apply import inner_norm

TOLERANCE = 1e-4
_SAMPLES = 4096


@dataclass(frozen=True)
class Check:
    """The self-check's result.

    error: largest relative error `|a - b| / |a|` over the observed layers and the output, None when it was not run;
    where: the layer of that error; layers: steps the run has exercised, of `total`; reason: why it was not run.
    """

    error: float | None
    where: str = ""
    layers: int = 0
    total: int = 0
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and stayed within 1e-4."""
        return self.error is not None and self.error <= TOLERANCE


Observations = dict[str, list[Tensor]]


def observe(model: nn.Module, inputs: tuple[Any, ...], watched: Iterable[str]) -> Observations:
    """Run the model in eval mode and keep a sample of each watched module's output and of the network's own.

    Random numbers are the same each time. The sample is taken inside the hook, because what follows often changes the
    tensor in place.
    """
    seen: Observations = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            seen.setdefault(path, []).extend(_sample(t) for t in _floats(out))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        seed_everything(model)
        shrink_images(model)
        for path in watched:
            stack.callback(module_at(model, path).register_forward_hook(hook_for(path)).remove)
        out = model(*inputs)
        if not _is_detections(out):
            seen["(output)"] = [_sample(t) for t in _floats(out)]
    return seen


def repeats(model: nn.Module, inputs: tuple[Any, ...], watched: Iterable[str]) -> bool:
    """Whether two runs of a model on the same input, with the same random numbers, give the same."""
    watched = list(watched)
    once, again = (observe(model, inputs, watched) for _ in range(2))
    errors = [_relative_error(before, again.get(path, [])) for path, before in once.items()]
    return not any(error > TOLERANCE for error in errors)  # NaN: nothing is finite, alike in both runs


def _is_detections(out: Any) -> bool:
    """Boxes after NMS: rounding tips a tie and reorders them, so the heads are compared, not what is made of them."""
    return isinstance(out, list) and all(isinstance(one, Mapping) and "boxes" in one for one in out)


def _floats(tree: Any) -> list[Tensor]:
    """The floating tensors of any output: a tensor, tuple, dict, or a model's own output class."""
    leaves = pytree.tree_leaves(dict(tree) if isinstance(tree, Mapping) else tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _sample(tensor: Tensor) -> Tensor:
    """Values of the tensor, evenly spread and at most so many: a copy of these alone, whatever its memory format."""
    step = max(1, -(-tensor.numel() // _SAMPLES))
    at = torch.arange(0, tensor.numel(), step, device=tensor.device)
    return tensor.detach()[torch.unravel_index(at, tensor.shape)].cpu()


def watched_paths(model: nn.Module, plan: Plan) -> list[str]:
    """What to observe: the converted norms, and every other layer with weights that the plan does not change."""
    folded = {producer for step in plan.steps for producer in step.producers}
    norms = {step.path for step in plan.steps}
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    others = [n for n, m in model.named_modules() if isinstance(m, layers) and n not in folded]
    return [*sorted(norms - {""}), *others]


def applicable(plan: Plan) -> bool:
    """Whether the plan claims anything a run can prove; copying or resetting gamma and beta does not."""
    return any(step.transfer not in ("copy", "reset") for step in plan.steps)


def compare(
    model: nn.Module, plan: Plan, inputs: tuple[Any, ...], reference: Observations, originals: Mapping[str, nn.Module]
) -> Check:
    """Run the converted model with bare norms and compare with what `observe` saw of the original."""
    with bare(model, plan, originals):
        seen = observe(model, inputs, [path for path in reference if path != "(output)"])
    error, where = difference(reference, seen)
    exercised = sum(bool(reference.get(step.path)) or step.path == "" for step in plan.steps)
    return Check(error, where, exercised, len(plan.steps))


@contextmanager
def bare(model: nn.Module, plan: Plan, originals: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, the converted norms compute what the original ones did from their standardised inputs."""
    with ExitStack() as stack:
        for step in plan.steps:
            _bare(stack, module_at(model, step.path), step, originals.get(step.path))
        yield


def difference(reference: Observations, seen: Observations) -> tuple[float, str]:
    """The largest relative error of any observed layer, and where; NaN and Inf count as the largest."""
    errors = {path: _relative_error(before, seen.get(path, [])) for path, before in reference.items()}
    where = max(errors, key=lambda path: math.inf if math.isnan(errors[path]) else errors[path], default="")
    error = errors.get(where, 0.0)
    return error, where if error else ""


def _relative_error(before: list[Tensor], after: list[Tensor]) -> float:
    """`|a - b| / |a|`. Values that are not finite must be the same in both; NaN where nothing else is left."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    if not before:
        return 0.0
    a, b = torch.cat(before).double(), torch.cat(after).double()
    finite = a.isfinite() & b.isfinite()
    if not bool(finite.all()):  # such as what a mask sets to -inf
        if not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
            return math.inf
        if not bool(finite.any()):
            return math.nan
        a, b = a[finite], b[finite]
    scale = float(a.norm())
    return float((a - b).norm()) / scale if scale > 0 else float((a - b).norm())


def _bare(stack: ExitStack, module: nn.Module, step: Step, original: nn.Module | None) -> None:
    """Until the stack closes, let the module compute what the original norm did, from its standardised input."""
    if step.transfer in ("fold", "prescale"):
        norm = inner_norm(module)
        factor = 1.0 if step.options.eps is None else math.sqrt(1 + step.options.eps)

        def affine(x: Tensor) -> Tensor:
            weight = torch.ones(step.channels) if norm.weight is None else norm.weight
            y = x * per_channel(weight.to(x) / factor, x.dim())
            return y if norm.bias is None else y.add_(per_channel(norm.bias.to(x), x.dim()))

        _override(stack, norm, affine)
    elif step.transfer in ("copy", "reset") and original is not None:
        stack.enter_context(evaluating(original))
        _override(stack, module, original.forward)


def _override(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward
    stack.callback(module.__dict__.pop, "forward")
