"""How well inputs fit a network: whether they cause the statistics that its norms remember from training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import as_batches, run_on
from ..data.one_batch import images_in
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import aliases
from ..norms.registry import identify
from .moments import Moments, moments_of
from .norm_targets import first_input, state_of, statistics_of

FITS, ODD, MADE = 0.3, 0.45, 0.12
"""ResNet-20: its own images 0.17, crops of unrelated photographs 0.25, their values in another range from 0.39 on,
noise 0.55, values 255 times too large 1.0. A network of CT slices: photographs 0.74; inputs made for it that reach 0.16
harm it, so that MADE is the limit for those."""
_ENOUGH = 64  # images that tell how near the rest are


@dataclass(frozen=True)
class Fit:
    """What `fit` found. distance: 0 where the statistics are those of training, about 1 for inputs of another kind."""

    distance: float
    images: int

    @property
    def verdict(self) -> str:
        """One phrase for people."""
        if self.suits:
            return "like what the network was trained on"
        if not self.far:
            return "somewhat unlike what the network was trained on"
        return "not what the network was trained on"

    @property
    def far(self) -> bool:
        """Whether what a network makes of the inputs is nothing to be kept: its statistics do not suit them.

        Fitted to its outputs there, a GroupNorm network trains worse than as it was converted, and worse than BN, which
        takes the statistics of its batches (`benchmarks/far_data.py`).
        """
        return self.distance > ODD

    @property
    def suits(self) -> bool:
        """Whether the inputs are like what the network was trained on."""
        return self.distance <= FITS

    def __str__(self) -> str:
        return f"distance {self.distance:.2g} from the running statistics: {self.verdict}"


def remembering(model: nn.Module) -> dict[str, nn.Module]:
    """Norms with running mean and variance, by path."""
    found = {names[0]: module for module, names in aliases(model).items() if identify(module) is not None}
    return {path: module for path, module in found.items() if state_of(module).has_statistics}


def fit(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> Fit | None:
    """Run the network in eval mode and compare; None where it has no running statistics.

    batches: tuples of the forward's arguments. The distance is the root of the mean over norms and channels of
    `d / (1 + d)` with `d = ((m - mean)^2 + (s - sqrt(var))^2) / (var + eps)`, m and s being mean and deviation of what
    enters the norm, over all images and positions. Raises DataError where the network cannot run on them.
    """
    norms = remembering(model)
    if not norms:
        return None
    moments = {path: Moments() for path in norms}
    count = 0
    with _running(model, norms, lambda path, x, dim: moments[path].add(moments_of(x, dim))), torch.no_grad():
        for args in batches:
            run_on(model, model, args, fewer="Use fewer images at a time.")
            count += len(args[0])
    return measured(norms, moments, count)


def fit_of_some(model: nn.Module, data: Any) -> Fit | None:
    """The `fit` of the first images of anything that `as_batches` takes, for a network that is to train on them."""
    some: list[tuple[Any, ...]] = []
    for args, _ in as_batches(data, network=model):
        some.append(args)
        if sum(map(images_in, some)) >= _ENOUGH:
            break
    return fit(model, some)


def measured(norms: Mapping[str, nn.Module], moments: Mapping[str, Moments], images: int) -> Fit:
    """The fit of so many images that caused these moments before the norms; see `fit`."""
    gaps = [_gap(m.mean, m.var.sqrt(), norms[path]) for path, m in moments.items() if m.count]
    total = torch.stack([(d / (1 + d)).mean().cpu() for d in gaps]).mean() if gaps else torch.tensor(1.0)
    return Fit(float(total.nan_to_num(1.0).sqrt()), images)


@contextmanager
def _running(
    model: nn.Module, norms: Mapping[str, nn.Module], seen: Callable[[str, Tensor, int], None]
) -> Iterator[None]:
    """Eval mode, with `seen(path, input, channel_dim)` called at each of the norms."""

    def hook_for(path: str) -> Callable[..., None]:
        dim = state_of(norms[path]).channel_dim
        return lambda module, args, kwargs: seen(path, first_input(args, kwargs), dim)

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(evaluating(model))
        for path, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(hook_for(path), with_kwargs=True).remove)
        yield


def _gap(mean: Tensor, deviation: Tensor, norm: nn.Module) -> Tensor:
    """Squared distance of each channel from the norm's statistics, in its own standard deviations."""
    kept, var = (t.to(mean) for t in statistics_of(norm))
    return ((mean - kept).square() + (deviation - var.sqrt()).square()) / (var + state_of(norm).eps)


@contextmanager
def statistics_loss(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, a function of a batch: the mean over norms and channels of the distance it causes, for its gradient.

    Yin et al. 2020, "Dreaming to Distill" (DeepInversion, arXiv:1912.08795), with standardised channels, so that
    each counts alike.
    """
    norms = remembering(model)
    gaps: list[Tensor] = []

    def seen(path: str, x: Tensor, dim: int) -> None:
        var, mean = torch.var_mean(x.movedim(dim, 0).flatten(1), 1, correction=0)
        gaps.append(_gap(mean, (var + 1e-12).sqrt(), norms[path]).mean())

    def loss(x: Tensor) -> Tensor:
        gaps.clear()
        model(x)
        return torch.stack(gaps).mean()

    with ExitStack() as stack:
        stack.enter_context(_running(model, norms, seen))
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield loss
