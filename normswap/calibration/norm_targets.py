"""What `calibrate` may change: the converted norms, each with its counterpart in the original network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..conversion.bound import inner_norm
from ..conversion.exact_scaling import scale_layer
from ..conversion.record import record_of
from ..errors import Fix, NetworkError, NormswapError, Text
from ..modules.gains import gain_of
from ..modules.precision import at_least_float32
from ..modules.tree import module_at
from ..norms._padded import PADDED
from ..norms._wrappers import ChannelAffine, per_channel
from ..norms.registry import identify
from ..norms.spec import NormState
from ..planning.plan import Step, Transfer
from .moments import Moments

# A channel whose variance is below these shares of its squared mean and of the layer's mean variance is dead:
# what varies in it is rounding.
_ROUNDING, _SILENT = 1e-12, 1e-14


@dataclass(eq=False)
class Target:
    """One converted norm.

    norm: the module that holds gamma and beta. original: its counterpart in the reference, None without a reference.
    statistics: whether it has running statistics to estimate. match: whether gamma and beta are
    set so that the output has the original's moments. carriers: where no norm is left, what holds its scale and shift:
    the layers before it or a `ChannelAffine`.
    """

    path: str
    name: str
    norm: nn.Module
    original: nn.Module | None
    statistics: bool
    match: bool
    carriers: tuple[Any, ...] = ()

    @property
    def padded(self) -> bool:
        """Whether padded steps do not count."""
        return isinstance(self.norm, PADDED)

    @property
    def state(self) -> NormState:
        """The norm's tensors and options as they are now; of what is no norm, how many channels it has."""
        if self.carriers and self.original is not None:
            return NormState(state_of(self.original).channels, eps=0.0)
        return state_of(self.norm)


def targets_of(model: nn.Module, reference: nn.Module | None) -> list[Target]:
    """The converted norms that can be calibrated, in the order of the plan.

    Frozen and fused norms need nothing and are left out, but where the original had no running statistics for them; so
    are those set to zero on purpose (zero_init).
    """
    record = record_of(model)
    if record is None:
        steps: list[tuple[str, Step | None]] = [(path, None) for path in _counterparts(model, reference)]
    else:
        steps = [(s.path, s) for s in record.plan.steps if not s.zero_init]
    found = []
    for path, step in steps:
        norm = inner_norm(module_at(model, path))
        spec = identify(norm)
        waits = step is not None and step.transfer.waits
        if step is not None and waits and spec is None:
            layers = (module_at(model, p) for p in step.producers)
            carriers = (norm,) if isinstance(norm, ChannelAffine) else tuple(layers)
            found.append(Target(path, step.target, norm, _original(reference, path), False, True, carriers))
        elif spec is not None and (waits or not spec.fixed):
            statistics = spec.read(norm).has_statistics
            match = not (statistics and step is not None and step.transfer is Transfer.EXACT)
            found.append(Target(path, spec.name, norm, _original(reference, path), statistics, match))
    return found


def _counterparts(model: nn.Module, reference: nn.Module | None) -> Iterator[str]:
    """In a network that normswap did not convert: paths where both have norms, of different types."""
    if reference is None:
        raise NetworkError(
            "this model was not made by normswap.convert or normswap.load, so its original is not known",
            hint=Text("Pass the original network as ", Fix("reference"), "."),
        )
    modules = dict(reference.named_modules())
    for path, module in model.named_modules():
        mine = identify(module)
        theirs = identify(modules[path]) if path in modules else None
        if mine is not None and theirs is not None and mine.name != theirs.name:
            yield path


def _original(reference: nn.Module | None, path: str) -> nn.Module | None:
    if reference is None:
        return None
    try:
        module = module_at(reference, path)
    except KeyError:
        module = None
    if module is None or identify(module) is None:
        raise NetworkError(f"the reference has no norm at {path}; it is not the network that was converted")
    return module


def state_of(norm: nn.Module) -> NormState:
    """The tensors and options of a module that is known to be a norm."""
    spec = identify(norm)
    if spec is None:
        raise TypeError(f"{type(norm).__name__} is no norm")
    return spec.read(norm)


def statistics_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a norm that has them, the tensors themselves."""
    state = state_of(norm)
    if state.running_mean is None or state.running_var is None:
        raise TypeError(f"{type(norm).__name__} has no running statistics")
    return state.running_mean, state.running_var


def first_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a module was called with, in whichever way."""
    return args[0] if args else next(iter(kwargs.values()))


def fixed_map(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, `(C,)` float64, of a norm that has running statistics: `y = scale x + shift`."""
    state, (mean, var) = state_of(norm), statistics_of(norm)
    scale = (var.double() + state.eps).rsqrt()
    scale = scale if state.weight is None else scale * state.weight.detach().double()
    shift = -mean.double() * scale
    return scale, shift if state.bias is None else shift + state.bias.detach().double()


def bare_output(original: nn.Module, x: Tensor) -> Tensor:
    """What a norm gives without the activation that is fused into it."""
    tail = {name: original._modules[name] for name in state_of(original).tail}
    original._modules.update({name: nn.Identity() for name in tail})
    try:
        out: Tensor = original.forward(x)
    finally:
        original._modules.update(tail)
    return out


def standardized(original: nn.Module, x: Tensor) -> Tensor:
    """What a norm gives without its gamma and beta, and without the activation that is fused into it."""
    names: list[str] = [name for name in ("weight", "bias") if name in original._parameters]
    affine: dict[str, nn.Parameter | None] = {name: original._parameters[name] for name in names}
    original._parameters.update(dict.fromkeys(names))
    try:
        return bare_output(original, x)
    finally:
        original._parameters.update(affine)


def alive(moments: Moments) -> Tensor:
    """Channels that vary by more than rounding, `(C,)` bool."""
    var = moments.var
    floor = _ROUNDING * moments.mean.square() + _SILENT * var.mean() + torch.finfo(torch.float32).tiny
    return var > floor


def repair(original: Moments, now: Moments, *, silence: bool = False) -> tuple[Tensor, Tensor]:
    """`k = sqrt(v_ref / v_new)` and `shift = m_ref - k m_new`, `(C,)` float64.

    `k y + shift` has the original's moments. A channel dead in either network keeps k = 1; its mean is matched.
    silence: where nothing has brought gamma over, one that is dead in the original alone gets k = 0.
    """
    both = alive(now) if silence else alive(original) & alive(now)
    k = torch.where(both, (original.var / torch.where(both, now.var, 1.0)).sqrt(), 1.0)
    return k, original.mean - k * now.mean


def distance(original: Moments, now: Moments) -> float:
    """How far the moments are apart, relative to the layer's size.

    `sqrt(sum_c (m_c - m'_c)^2 + (s_c - s'_c)^2) / sqrt(sum_c s_c^2)`, s the standard deviations; the 2-Wasserstein
    distance between normal distributions. The difference itself where the original does not vary at all.
    """
    gap = (original.mean - now.mean).square() + (original.var.sqrt() - now.var.sqrt()).square()
    total, size = float(gap.sum()), float(original.var.sum())
    return math.sqrt(total / size) if size > 0 else math.sqrt(total)


@torch.no_grad()
def set_parameter(norm: nn.Module, name: str, value: Tensor) -> Tensor:
    """Write gamma or beta, in place where it exists. Returns the values as stored, in float64."""
    old = getattr(norm, name)
    if parametrize.is_parametrized(norm, name):
        setattr(norm, name, value.to(old))
    elif old is None:
        like = next((t for t in norm.parameters()), None)
        dtype, device = (torch.float32, value.device) if like is None else (like.dtype, like.device)
        norm._parameters[name] = nn.Parameter(value.to(device, dtype), requires_grad=False)
    else:
        old.copy_(value)
    return getattr(norm, name).detach().double().clone()


def apply_repair(target: Target, k: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`gamma' = k gamma`, `beta' = k beta + shift`; a norm without them gets them, fixed. Returns what was achieved.

    A norm that knows no beta (RMSNorm) gets k alone. Where no norm is left, what holds its scale and shift is changed.
    The result is k and shift after rounding to the stored dtype.
    """
    for carrier in target.carriers:
        _scale_carrier(carrier, k, shift)
    if target.carriers:
        return k, shift
    norm, state = target.norm, target.state
    k, shift = k.to(_device(state, k)), shift.to(_device(state, shift))
    gamma = torch.ones_like(k) if state.weight is None else state.weight.detach().double().clone()
    beta = torch.zeros_like(k) if state.bias is None else state.bias.detach().double().clone()
    stored = set_parameter(norm, "weight", gamma * k)
    achieved = torch.where(gamma == 0, k, stored / torch.where(gamma == 0, 1.0, gamma))
    if "bias" not in norm._parameters and not hasattr(norm, "bias"):
        return achieved, torch.zeros_like(k)
    added = set_parameter(norm, "bias", beta * k + shift) - achieved * beta
    if callable(refresh := getattr(norm, "refresh", None)):
        refresh()
    return achieved, added


@torch.no_grad()
def _scale_carrier(carrier: Any, k: Tensor, shift: Tensor) -> None:
    if isinstance(carrier, ChannelAffine):
        k, shift = k.to(carrier.scale.device), shift.to(carrier.scale.device)
        carrier.shift.copy_(k * carrier.shift + shift)
        carrier.scale.copy_(k * carrier.scale)
    else:
        device = gain_of(carrier).device
        scale_layer(carrier, "", at_least_float32(k).to(device), at_least_float32(shift).to(device), keep_undo=False)


def _device(state: NormState, like: Tensor) -> torch.device:
    known = state.weight if state.weight is not None else state.running_var
    return like.device if known is None else known.device


@torch.no_grad()
def apply_statistics(target: Target, inputs: Moments) -> None:
    """Running mean and (unbiased) variance over all values of the input."""
    if inputs.count < 2:
        raise NormswapError(f"{target.path}: a variance needs more than one value per channel, the data gives one")
    for name, value in (("running_mean", inputs.mean), ("running_var", inputs.unbiased_var)):
        buffer = target.norm.get_buffer(name)
        buffer.view(-1, len(value)).copy_(value)  # lightly's SplitBatchNorm holds those of several parts of a batch
    if callable(refresh := getattr(target.norm, "refresh", None)):
        refresh()  # what a frozen norm has computed from them


def statistics_output(target: Target, inputs: Moments) -> Moments:
    """The moments of the output of a norm with running statistics, `(x - mean) / sqrt(var + eps) * gamma + beta`."""
    return inputs.mapped(*fixed_map(target.norm))


def rewrite(y: Tensor, k: Tensor, shift: Tensor, channel_dim: int) -> None:
    """`y = k y + shift` in place, computed in at least float32."""
    view = y.movedim(channel_dim, 1)
    scale, add = (per_channel(t.to(at_least_float32(y)), y.dim()) for t in (k, shift))
    if y.dtype == scale.dtype:
        view.mul_(scale).add_(add)
    else:
        view.copy_(view * scale + add)


class Result:
    """What a calibrated norm holds, to be written again after something has put its buffers and attributes back."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.parameters = dict(norm._parameters)
        self.buffers = {name: b.clone() for name, b in norm._buffers.items() if b is not None}

    @torch.no_grad()
    def write(self) -> None:
        """Parameters by identity, buffers by value."""
        self.norm._parameters.update(self.parameters)
        for name, value in self.buffers.items():
            self.norm.get_buffer(name).copy_(value)
        if self.norm.__dict__.get("affine") is False:
            self.norm.__dict__["affine"] = self.norm._parameters.get("weight") is not None


@contextmanager
def restoring(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any exception, Ctrl-C included, put back the modules' own attributes, parameters and buffers."""
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = []
    values: list[tuple[Tensor, Tensor]] = []
    for module in {m: None for parent in modules for m in nn.Module.modules(parent)}:
        tables = {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers")}
        kept.append((module, dict(module.__dict__), tables))
        values += [(t, t.detach().clone()) for table in tables.values() for t in table.values() if t is not None]
    try:
        yield
    except BaseException:
        for module, attributes, tables in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, table in tables.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(table)
        for tensor, value in values:
            tensor.data.copy_(value)
        raise
