"""Convert a network: plan, check, apply, prove."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import Indivisible, MissingStatistics
from ..choices import Transfer as TransferWord
from ..errors import Fix, OptionError, Text, plural
from ..files.spilling import spilled, spilling
from ..inspection.example_inputs import as_inputs, inputs_for, tensors_given
from ..modules.tree import copied
from ..modules.wrappers import check_wrapper, rewrapped, unwrapped
from ..norms.registry import identify, states_in
from ..planning.options import PlanOptions
from ..planning.plan import Plan
from ..planning.planner import planned
from ..planning.rules import Rules
from .apply import apply
from .bound import BoundPlan, bind
from .parameter_edits import parameter
from .preconditions import affine_moved, check_values, never_updated
from .record import Check, Record, attach, record_of
from .self_check import prove, reference_of
from .stabilize import Sizes
from .undo_record import Undo

_NEGLECTED = (
    "{} was trained, but the running statistics of its {} norms never updated (mean 0, variance 1), so nothing can be "
    "carried over. If it works in training mode alone, estimate them before converting: "
    "normswap.estimate_statistics(model, images)"
)
_PADDING = (
    "{} takes statistics over time, and padded steps cannot be told there, so that padding changes them{}; "
    "ln-channel takes none over time, and so does rms where channels come last"
)

_IDLE = (
    "the run that shows what writes to the stream and who reads the norms did not use {}: where these do either, the "
    "outputs will not be the same. Example inputs that make the network use them settle it"
)


def cautions(plan: Plan) -> list[str]:
    """What no run shows of a plan, and its caller should know: a sentence each."""
    found = []
    if idle := plan.meta.get("idle"):
        found.append(_IDLE.format(", ".join(idle[:3]) + " ..." * (len(idle) > 3)))
    if counted := plan.meta.get("padding"):
        more = f" (and {plural(len(counted) - 1, 'more norm')})" if len(counted) > 1 else ""
        found.append(_PADDING.format(counted[0], more))
    return found


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
    transfer: TransferWord = "fold",
    eps: float | str | None = None,
    rules: Rules | None = None,
    sources: Collection[str] | None = None,
    example_inputs: Any = None,
    zero_init_residual: bool = False,
    missing_statistics: MissingStatistics = "error",
    fold_affine: bool = False,
    inplace: bool = False,
    check: bool = True,
    undo: bool = True,
    using: Plan | None = None,
) -> nn.Module:
    """Replace the norm layers of `model` and carry over what they have learned. Returns the converted network.

    The arguments up to `fold_affine` are those of `plan`; `using` takes a ready plan instead of them.
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
    options = ConvertOptions(
        to,
        groups,
        channels_per_group,
        indivisible,
        transfer,
        eps,
        rules,
        sources,
        example_inputs,
        zero_init_residual,
        missing_statistics,
        fold_affine,
        inplace,
        check,
        undo,
        using,
    )
    return converted(model, options)


@dataclass(frozen=True, eq=False)
class ConvertOptions(PlanOptions):
    """The arguments of `convert`, which explains them. Raises OptionError for a plan beside what is to be planned."""

    inplace: bool = False
    prove: bool = True
    undo: bool = True
    using: Plan | None = None

    def __post_init__(self) -> None:
        if self.using is not None and self.say_what:
            raise OptionError("give either a plan (using=) or what to plan (to=, rules=, ...), not both")


def converted(model: nn.Module, options: ConvertOptions) -> nn.Module:
    """`convert`, with its arguments as one value."""
    check_wrapper(model)
    wrapper, model = model, unwrapped(model)
    before = record_of(model)
    if before is not None and before.note(Sizes) is not None:
        raise OptionError("the network is stabilized for training", hint="Convert it after `with stabilized(...)`.")
    plan = planned(model, options) if options.using is None else options.using
    for caution in cautions(plan):
        warnings.warn(caution, stacklevel=3)
    bound = bind(model, plan)
    check_values(model, bound)
    states = states_in(model) if plan.standardizes else []
    if (count := never_updated(states)) and affine_moved(states):
        warnings.warn(_NEGLECTED.format(type(model).__name__, count), stacklevel=3)
    unproved = _why_unproved(model, plan, options)
    inputs = None if unproved else inputs_for(model, options.example_inputs)
    if not unproved and inputs is None:
        unproved = Text("no input is known that the network runs on; give ", Fix("example_inputs"))
        warnings.warn(f"the self-check was not run: {unproved} (or check=False)", stacklevel=3)
    reference = None if inputs is None else reference_of(model, plan, inputs)
    work = model if options.inplace else copied(model)
    if work is not model:
        bound = bind(work, plan)
    previous = record_of(work)
    original = None if options.inplace else model
    if spilling():
        original = copied(model) if reference is not None else None  # of its norms; all else it has in common
        _spill(work, bound)
    root, undo = apply(work, bound, keep_undo=options.undo or reference is not None)
    check = Check(None, reason=unproved, total=len(plan.steps))
    record = Record(plan, undo, check, previous=previous, notes=dict(previous.notes) if previous else {})
    record.inputs = _known_of(options.example_inputs) or (dict(previous.inputs) if previous else {})
    attach(root, record)
    if reference is not None:
        record.check = prove(root, bound, reference, original)
    if not options.undo:
        record.undo = Undo(complete=False)
    return rewrapped(wrapper, root, inplace=options.inplace)


def _spill(model: nn.Module, bound: BoundPlan) -> None:
    """Put what the plan changes into files that may be written to; norms, which are small, into memory."""
    norms = [module for module in nn.Module.modules(model) if identify(module) is not None]
    for tensor in {id(t): t for norm in norms for t in (*norm.parameters(), *norm.buffers())}.values():
        tensor.data = tensor.data.clone()
    changed = [p for each in bound for layer in each.producers for p in layer._parameters.values()]
    changed += [parameter(model, name) for name in bound.plan.edited]
    for tensor in {id(p): p for p in changed if p is not None}.values():
        tensor.data = spilled(tensor.data)


def _known_of(example_inputs: Any) -> dict[str, Any]:
    """What to remember of inputs that were given: the shape of a single floating tensor, or how many there are."""
    given = as_inputs(example_inputs)
    if (count := tensors_given(example_inputs)) > 1:
        return {"arguments": count}
    single = len(given) == 1 and isinstance(given[0], torch.Tensor) and given[0].is_floating_point()
    return {"shape": list(given[0].shape[1:])} if single and given[0].dim() > 1 else {}


def _why_unproved(model: nn.Module, plan: Plan, options: ConvertOptions) -> str:
    """Why there is to be no self-check; empty where there is."""
    if not options.prove:
        return "not asked for"
    if not plan.provable:
        if any(step.transfer.waits for step in plan.steps):
            return "the statistics are estimated on images, which does not keep the outputs"
        return "gamma and beta alone were carried over, which does not keep the outputs"
    return "the model is on the meta device and cannot run" if any(p.is_meta for p in model.parameters()) else ""
