"""Convert a network: plan, check, apply, prove."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import OptionError
from ..modules.tree import copied
from ..modules.wrappers import check_wrapper, rewrapped, unwrapped
from ..norms.registry import states_in
from ..planning.plan import Plan
from ..planning.planner import plan
from ..planning.rules import Rules
from .apply import apply
from .bound import bind
from .preconditions import affine_moved, check_values, needs_statistics, never_updated
from .record import Check, Record, put_record, record_of
from .self_check import NO_INPUT, prove, reference_of
from .undo_record import Undo

_NEGLECTED = (
    "{} was trained, but the running statistics of its {} norms never updated (mean 0, variance 1), so nothing can be "
    "carried over. If it works in training mode alone, estimate them before converting: "
    "normswap.estimate_statistics(model, images)"
)


def convert(
    model: nn.Module,
    to: str | None = None,
    *,
    groups: int | str | None = None,
    channels_per_group: int | None = None,
    indivisible: str = "error",
    transfer: str = "fold",
    eps: float | str | None = None,
    rules: Rules | None = None,
    sources: Collection[str] | None = None,
    example_inputs: Any = None,
    zero_init_residual: bool = False,
    missing_statistics: str = "error",
    inplace: bool = False,
    check: bool = True,
    undo: bool = True,
    using: Plan | None = None,
) -> nn.Module:
    """Replace the norm layers of `model` and carry over what they have learned. Returns the converted network.

    The arguments up to `missing_statistics` are those of `plan`; `using` takes a ready plan instead of them.
    inplace=True converts `model` itself, which saves a copy of it (the returned root is a new module only when the
    root itself is a norm). check=True proves the surgery: on `example_inputs`, or on a random input that the
    network is found to take, the converted network with bare norms must equal the original to a relative 1e-4, else
    it is undone; where no such input is found, a warning says so. undo=False keeps nothing for `revert`.

    dtype, device, training flags, `requires_grad`, hooks, attributes, ties and aliases stay as they are; gamma and
    beta stay the same Parameter objects. A network in DataParallel or torch.compile is converted within, under its
    own names, and wrapped again. Warns of a trained network whose running statistics were never updated. Raises
    OptionError (for one in DistributedDataParallel too: wrap the result), PlanError or SelfCheckError, and then
    nothing changed.
    """
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
    bound = bind(model, using)
    check_values(model, bound)
    states = states_in(model) if needs_statistics(using) else []
    if (count := never_updated(states)) and affine_moved(states):
        warnings.warn(_NEGLECTED.format(type(model).__name__, count), stacklevel=2)
    reference = reference_of(model, using, example_inputs, wanted=check)
    if reference.reason == NO_INPUT:
        warnings.warn(f"the self-check was not run: {NO_INPUT} (or check=False)", stacklevel=2)
    work = model if inplace else copied(model)
    if work is not model:
        bound = bind(work, using)
    previous = record_of(work)
    root, undo_record = apply(work, bound, keep_undo=undo or reference.inputs is not None)
    check_result = Check(None, reason=reference.reason, total=len(using.steps))
    record = Record(using, undo_record, check_result, previous=previous, head=previous.head if previous else None)
    put_record(root, record)
    if reference.inputs is not None:
        record.check = prove(root, bound, reference, None if inplace else model)
    if not undo:
        record.undo = Undo(complete=False)
    return rewrapped(wrapper, root, inplace=inplace)
