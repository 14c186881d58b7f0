"""Convert a network: plan, check, apply, prove."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import Indivisible, MissingStatistics, Transfer
from ..errors import DataError, Fix, NormswapError, OptionError, SelfCheckError, Text, first_line
from ..inspection.example_inputs import guess_inputs
from ..inspection.inventory import as_inputs
from ..modules.tree import check_module, copied, device_and_dtype
from ..modules.wrappers import check_wrapper, rewrapped, unwrapped
from ..planning.plan import Plan
from ..planning.planner import plan
from ..planning.rules import Rules
from .apply import apply
from .preconditions import affine_moved, check_fit, check_values, needs_statistics, never_updated
from .record import Record, put_record, record_of
from .revert import revert
from .self_check import TOLERANCE, Check, Observations, applicable, compare, observe, repeats, watched_paths
from .undo_record import Undo


def back_in_order(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """What brings the output of the module at a path, `(N, C, *)`, into the order of the original's channels.

    `calibrate` may have changed that order inside blocks; values of two networks compare only in the same one.
    """
    rows: dict[str, list[Tensor]] = {}
    record = record_of(model)
    while record is not None:
        for order in record.undo.orders:
            if order.rows is not None:
                rows.setdefault(order.path, []).append(order.rows)
        record = record.previous

    def back(path: str, out: Tensor) -> Tensor:
        for index in rows.get(path, ()):
            if out.dim() > 1 and out.shape[1] == len(index):
                out = out.index_select(1, index.argsort().to(out.device))
        return out

    return back


def convert(
    model: nn.Module,
    to: str | None = None,
    *,
    groups: int | str | None = None,
    channels_per_group: int | None = None,
    indivisible: Indivisible = "error",
    transfer: Transfer = "fold",
    eps: float | str | None = None,
    rules: Rules | None = None,
    sources: Collection[str] | None = None,
    example_inputs: Any = None,
    zero_init_residual: bool = False,
    missing_statistics: MissingStatistics = "error",
    inplace: bool = False,
    check: bool = True,
    undo: bool = True,
    using: Plan | None = None,
) -> nn.Module:
    """Replace the norm layers of `model` and carry over what they have learned. Returns the converted network.

    The arguments up to `missing_statistics` are those of `plan`; `using` takes a ready plan instead of them.
    inplace=True converts `model` itself, which saves a copy of it (the returned root is a new module only when the
    root itself is a norm). check=True proves the result: on `example_inputs`, or on a random input that the
    network is found to take, the converted network with bare norms must equal the original to a relative 1e-4, else
    it is undone; where no such input is found, a warning says so. undo=False keeps nothing for `revert`.

    dtype, device, training flags, `requires_grad`, hooks, attributes, ties and aliases stay as they are; gamma and
    beta stay the same Parameter objects. A network in DataParallel or torch.compile is converted within, under its
    own names, and wrapped again. Warns of a trained network whose running statistics were never updated. Raises
    OptionError (for one in DistributedDataParallel too: wrap the result), PlanError or SelfCheckError, and then
    nothing changed.
    """
    check_module(model)
    check_wrapper(model)
    wrapper, model = model, unwrapped(model)
    before = record_of(model)
    if before is not None and before.factors:
        raise OptionError("the network is stabilized for training", hint="Convert it after `with stabilized(...)`.")
    if using is None:
        using = plan(
            model,
            to,
            groups=groups,
            channels_per_group=channels_per_group,
            indivisible=indivisible,
            transfer=transfer,
            eps=eps,
            rules=rules,
            sources=sources,
            example_inputs=example_inputs,
            zero_init_residual=zero_init_residual,
            missing_statistics=missing_statistics,
        )
    else:
        wanted = (to, groups, channels_per_group, eps, rules, sources)
        if any(value is not None for value in wanted) or (transfer, zero_init_residual) != ("fold", False):
            raise OptionError("give either a plan (using=) or what to plan (to=, rules=, ...), not both")
        check_fit(model, using)
    check_values(model, using)
    _warn_never_updated(model, using)
    inputs, reason = _check_inputs(model, using, example_inputs, wanted=check)
    reference = _observe(model, inputs, using) if inputs is not None else None
    work = model if inplace else copied(model)
    previous = record_of(work)
    root, undo_record = apply(work, using, keep_undo=undo or reference is not None)
    check_result = Check(None, reason=reason, total=len(using.steps))
    record = Record(using, undo_record, check_result, previous=previous, head=previous.head if previous else None)
    record.inputs = _shape_of(example_inputs) or (dict(previous.inputs) if previous else {})
    put_record(root, record)
    if reference is not None and inputs is not None:
        _prove(root, record, inputs, reference, model if not inplace else None)
    if not undo:
        record.undo = Undo(complete=False)
    return rewrapped(wrapper, root, inplace=inplace)


def _warn_never_updated(model: nn.Module, using: Plan) -> None:
    if needs_statistics(using) and (count := never_updated(model)) and affine_moved(model):
        warnings.warn(
            f"{type(model).__name__} was trained, but the running statistics of its {count} norms never updated (mean "
            "0, variance 1), so nothing can be carried over. If it works in training mode alone, estimate them before "
            "converting: normswap.estimate_statistics(model, images)",
            stacklevel=3,
        )


def _shape_of(example_inputs: Any) -> dict[str, Any]:
    """What to remember of inputs that were given: the shape of one, of a network that takes one floating tensor."""
    given = as_inputs(example_inputs)
    single = len(given) == 1 and isinstance(given[0], torch.Tensor) and given[0].is_floating_point()
    return {"shape": list(given[0].shape[1:])} if single and given[0].dim() > 1 else {}


def _check_inputs(
    model: nn.Module, using: Plan, example_inputs: Any, *, wanted: bool
) -> tuple[tuple[Any, ...] | None, str]:
    """Inputs for the self-check, or None and the reason why there is none."""
    if not wanted:
        return None, "not asked for"
    if not applicable(using):
        return None, "gamma and beta alone were carried over, which does not keep the outputs"
    if any(p.is_meta for p in model.parameters()):
        return None, "the model is on the meta device and cannot run"
    if example_inputs is not None:
        return as_inputs(example_inputs), ""
    guess = guess_inputs(model)
    if guess is not None:
        return guess, ""
    reason = "no input is known that the network runs on; give example_inputs"
    warnings.warn(f"the self-check was not run: {reason} (or check=False)", stacklevel=3)
    return None, reason


def _observe(model: nn.Module, inputs: tuple[Any, ...], using: Plan) -> Observations:
    try:
        return observe(model, inputs, watched_paths(model, using))
    except Exception as error:  # whatever the model's forward raises on inputs it was not made for
        raise DataError(
            f"{type(model).__name__} cannot run on the example inputs ({type(error).__name__}: {first_line(error)})",
            hint=Text(
                "Give inputs of the shape its forward takes, or skip the self-check with ", Fix("check", False), "."
            ),
        ) from error


def _prove(
    root: nn.Module, record: Record, inputs: tuple[Any, ...], reference: Observations, original: nn.Module | None
) -> None:
    """Run the self-check and note its result; raise SelfCheckError, with an in-place conversion undone, if it fails.

    Rounding grows through a deep network of random weights, and through half precision. A failure is therefore
    repeated in float64, where rounding is out of the question and only a wrong edge can fail.
    """
    using = record.plan
    norms = {norm.paths[0]: norm.module for norm in record.undo.norms}
    try:
        result = compare(root, using, inputs, reference, norms)
        if not result.passed:
            result = _in_float64(root, using, inputs, original) or result
    except BaseException as error:  # a forward that needs the old norm, or Ctrl-C: nothing may stay half done
        if original is None:
            revert(root)
        if not isinstance(error, Exception):
            raise
        raise SelfCheckError(
            f"the converted network does not run ({type(error).__name__}: {first_line(error)}); nothing was kept",
            hint="Its code may use something of the norm that the new one does not have; a rule keeps such a layer.",
        ) from error
    record.check = result
    if not result.passed:
        before = revert(root) if original is None else original
        raise _failure(result, before, repeats(before, inputs, watched_paths(before, using)))


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


def _in_float64(root: nn.Module, using: Plan, inputs: tuple[Any, ...], original: nn.Module | None) -> Check | None:
    """The self-check on a copy in float64; None where that could say nothing new, or no copy can be made."""
    if device_and_dtype(root)[1] == torch.float64 and not any(step.zero_init for step in using.steps):
        return None
    try:
        wide = copied(original) if original is not None else revert(copied(root))
    except NormswapError:
        return None
    wide = wide.double()
    inputs = tuple(_double(value) for value in inputs)
    plain = dataclasses.replace(using, steps=tuple(dataclasses.replace(s, zero_init=False) for s in using.steps))
    reference = observe(wide, inputs, watched_paths(wide, plain))
    converted, undo = apply(wide, plain, keep_undo=True)
    return compare(converted, plain, inputs, reference, {n.paths[0]: n.module for n in undo.norms})


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_double(v) for v in value)
    return {k: _double(v) for k, v in value.items()} if isinstance(value, dict) else value
