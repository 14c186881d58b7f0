"""Prove a conversion: with every new norm replaced by its bare per-channel map, the network must be the original.

Folding and prescaling make each norm's input have mean 0 and variance 1 by the BN's own statistics. If every edge was
right, `weight * x + bias` in the norm's place then computes what the BN computed, exactly up to rounding. A wrong edge
changes every value after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError, Fix, NormswapError, SelfCheckError, Text, first_line
from ..files.spilling import spilled, spilling
from ..modules.gains import gain_of
from ..modules.restore import seed_everything, trial_run
from ..modules.tree import copied, device_and_dtype, module_at
from ..norms._wrappers import per_channel
from ..norms.spec import NormState
from ..planning.plan import Plan, Transfer
from .apply import apply, signs
from .bound import BoundPlan, BoundStep, bind, bound_after
from .record import TOLERANCE, Check
from .revert import reverted

_SAMPLES = 4096
Observations = dict[str, list[Tensor]]


def observe(
    model: nn.Module,
    inputs: tuple[Any, ...],
    watched: Iterable[str],
    beside: Iterable[nn.Module] = (),
    seen_as: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> Observations:
    """Run the model in eval mode and keep a sample of each watched module's output and of the network's own.

    beside: modules outside of the model that run too. seen_as: what is kept of some outputs instead.

    Random numbers are the same each time. The sample is taken inside the hook, because what follows often changes the
    tensor in place.
    """
    seen: Observations = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            told = seen_as.get(path, lambda t: t)
            seen.setdefault(path, []).extend(_sample(told(t)) for t in _floats(out))

        return hook

    with ExitStack() as stack:
        stack.enter_context(trial_run(model, beside))
        seed_everything(model)
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
    return not any(_relative_error(before, again.get(path, [])) > TOLERANCE for path, before in once.items())


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
    return tensor.detach()[torch.unravel_index(at, tensor.shape)].reshape(-1).cpu()  # of a single number too


def watched_paths(model: nn.Module, plan: Plan) -> list[str]:
    """What to observe: the converted norms, and every other layer with weights that the plan does not change."""
    folded = {producer for step in plan.steps for producer in step.producers}
    norms = {step.path for step in plan.steps}
    folded |= {each.parameter.rpartition(".")[0] for each in plan.centred}
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    others = [n for n, m in model.named_modules() if isinstance(m, layers) and n not in folded]
    return [*sorted(norms - {""}), *others]


@dataclass(frozen=True)
class Reference:
    """What the original network does on the inputs of the self-check."""

    inputs: tuple[Any, ...]
    seen: Observations


def reference_of(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> Reference:
    """Run the network that is to be converted. Raises DataError where it does not take the inputs."""
    watched = watched_paths(model, plan)
    try:
        return Reference(inputs, observe(model, inputs, watched))
    except Exception as error:  # whatever the model's forward raises on inputs it was not made for
        raise DataError(
            f"{type(model).__name__} cannot run on the example inputs ({type(error).__name__}: {first_line(error)})",
            hint=Text(
                "Give inputs of the shape its forward takes, or skip the self-check with ", Fix("check", False), "."
            ),
        ) from error


def prove(root: nn.Module, bound: BoundPlan, reference: Reference, original: nn.Module | None) -> Check:
    """Run the self-check on a converted network; raise SelfCheckError, with an in-place conversion undone, if it fails.

    bound: the plan, bound to what was converted. original: None for a conversion in place. Rounding grows through a
    deep network of random weights, and through half precision. A failure is therefore repeated in float64, where
    rounding is out of the question and only a wrong edge can fail.
    """
    plan, inputs = bound.plan, reference.inputs
    try:
        result = compare(root, plan, inputs, reference.seen, _originals(bound))
        if not result.passed:
            result = _in_float64(root, plan, inputs, original) or result
    except BaseException as error:  # a forward that needs the old norm, or Ctrl-C: nothing may stay half done
        if original is None:
            reverted(root)
        if not isinstance(error, Exception):
            raise
        raise SelfCheckError(
            f"the converted network does not run ({type(error).__name__}: {first_line(error)}); nothing was kept",
            hint="Its code may use something of the norm that the new one does not have; a rule keeps such a layer.",
        ) from error
    if not result.passed:
        before = reverted(root) if original is None else original
        watched = watched_paths(before, plan)
        raise _failure(result, before, repeats(before, inputs, watched))
    return result


def _originals(bound: BoundPlan) -> dict[str, nn.Module]:
    return {each.step.path: each.module for each in bound}


def _in_float64(root: nn.Module, plan: Plan, inputs: tuple[Any, ...], original: nn.Module | None) -> Check | None:
    """The self-check on a copy in float64; None where that says nothing new, or the original has no such copy."""
    if device_and_dtype(root)[1] == torch.float64 and not any(step.zero_init for step in plan.steps):
        return None
    try:
        wide = copied(original) if original is not None else reverted(copied(root))
    except NormswapError:
        return None
    _widen(wide)
    inputs = tuple(_double(value) for value in inputs)
    plain = replace(plan, steps=tuple(replace(s, zero_init=False) for s in plan.steps))
    watched = watched_paths(wide, plain)
    try:
        reference = observe(wide, inputs, watched)
    except Exception:  # a forward that insists on float32: fake quantization, a cast of its own
        return None
    bound = bind(wide, plain)
    converted, _ = apply(wide, bound, keep_undo=True)
    return compare(converted, plain, inputs, reference, _originals(bound))


def _widen(model: nn.Module) -> None:
    """Bring a network into float64, where tensors are spilled one after the other."""
    if not spilling():
        model.double()
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = spilled(tensor.data.double())


def compare(
    model: nn.Module, plan: Plan, inputs: tuple[Any, ...], reference: Observations, originals: Mapping[str, nn.Module]
) -> Check:
    """Run the converted model with bare norms and compare with what `observe` saw of the original."""
    with bare(model, plan, originals):
        watched = [path for path in reference if path != "(output)"]
        seen = observe(model, inputs, watched, originals.values(), _with_affine(plan, originals))
    error, where = difference(reference, seen)
    exercised = sum(bool(reference.get(step.path)) or step.path == "" for step in plan.steps)
    return Check(error, where, exercised, len(plan.steps))


def _with_affine(plan: Plan, originals: Mapping[str, nn.Module]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For norms whose gamma and beta have gone into what reads them: what they would give with these."""

    def told(state: NormState) -> Callable[[Tensor], Tensor]:
        def with_both(x: Tensor) -> Tensor:
            x = x if state.weight is None else x * state.weight.to(x)
            return x if state.bias is None else x + state.bias.to(x)

        return with_both

    steps = [s for s in plan.steps if s.readers and s.path in originals]
    return {s.path: told(BoundStep(s, originals[s.path], ()).state) for s in steps}


@contextmanager
def bare(model: nn.Module, plan: Plan, originals: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, the converted norms compute what the original ones did from their standardised inputs."""
    with ExitStack() as stack:
        for each in bound_after(model, plan):
            _bare(stack, each, originals.get(each.step.path))
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


def _bare(stack: ExitStack, bound: BoundStep, original: nn.Module | None) -> None:
    """Until the stack closes, let the module compute what the original norm did, from its standardised input."""
    step, norm = bound.step, bound.norm
    if step.transfer.standardizes:
        factor = 1.0 if step.options.eps is None else math.sqrt(1 + step.options.eps)

        def affine(x: Tensor, valid: Tensor | None = None) -> Tensor:
            weight = torch.ones(step.channels) if norm.weight is None else norm.weight
            y = x * per_channel(weight.to(x) / factor, x.dim())
            return y if norm.bias is None else y.add_(per_channel(norm.bias.to(x), x.dim()))

        _override(stack, norm, affine)
    elif step.transfer is Transfer.ABSORB and original is not None:
        sign = signs(BoundStep(step, original, ()).state, gain_of(bound.producers[0]))
        _override(stack, bound.module, lambda x: original.forward(x * per_channel(sign.to(x), x.dim())))
    elif not step.transfer.keeps_outputs and original is not None:
        _override(stack, bound.module, original.forward)


def _override(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward
    stack.callback(module.__dict__.pop, "forward")


def _failure(result: Check, model: nn.Module, same: bool) -> SelfCheckError:
    """same: whether the original, `model`, gives the same each time."""
    if not same:
        return SelfCheckError(
            f"the self-check cannot tell at {result.where}: {type(model).__name__} itself gives another output each "
            "time it is run on the same input; nothing was kept",
            hint=Text(
                "It takes random numbers from a source of its own, or counts its runs. Let it give the same each time "
                "while it is converted, or skip the self-check with ",
                Fix("check", False),
                ".",
            ),
        )
    return SelfCheckError(
        f"the self-check failed at {result.where}: {_difference(result)}; nothing was kept",
        hint=Text(
            "Give real inputs with ",
            Fix("example_inputs"),
            ", or keep the layer with a rule; please report the network.",
        ),
    )


def _difference(result: Check) -> str:
    error = math.nan if result.error is None else result.error
    if math.isnan(error):
        return "the original itself gives nothing but NaN and Inf there"
    if math.isinf(error):
        return "the converted network gives NaN, Inf or other shapes where the original does not"
    return f"the converted network differs from the original by a relative {error:.2g} (allowed {TOLERANCE:g})"


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_double(v) for v in value)
    return {k: _double(v) for k, v in value.items()} if isinstance(value, dict) else value
