"""What a norm type is (`NormSpec`) and what one norm layer holds (`NormState`).

`NormState` is the hub: every type reads into it and builds from it, so N types need N readers and N builders
instead of N x N converters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from ..arguments import one_of
from ..choices import INDIVISIBLE
from ..errors import Fix, OptionError, Text


@dataclass(frozen=True)
class NormState:
    """One norm layer, whatever its type.

    Tensors are the module's own (no copies), each of shape `(C,)` with `C = channels`, or None.

    dims: spatial dimensions the module insists on: 1 `(N, C)` or `(N, C, L)`, 2 `(N, C, H, W)`,
        3 `(N, C, D, H, W)`, None if it takes any.
    channel_dim: 1 when channels come second `(N, C, *)`, -1 when they come last `(*, C)`.
    tail: what a fused norm-activation layer runs after the norm, in order (`drop`, `act`, `aa`).
    """

    channels: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    dims: int | None = None
    channel_dim: int = 1
    num_groups: int | None = None
    training: bool = True
    process_group: Any = None
    tail: Mapping[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Networks computed with NumPy have its numbers, which are no JSON values and no `int` to others.
        for name in ("channels", "num_groups", "dims"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))
        object.__setattr__(self, "eps", float(self.eps))

    @property
    def affine(self) -> bool:
        """Whether a per-channel weight (gamma) exists."""
        return self.weight is not None

    @property
    def has_statistics(self) -> bool:
        """Whether running statistics exist, so that the norm is a fixed per-channel affine map in eval."""
        return self.running_mean is not None and self.running_var is not None

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """`running_mean` and `running_var`. Raises ValueError where there are none."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError("this norm has no running statistics")
        return self.running_mean, self.running_var


@dataclass(frozen=True)
class NormRequest:
    """What the user asked of every layer of one target, before it is fitted to a layer's channels."""

    groups: int | str | None = None
    channels_per_group: int | None = None
    indivisible: str = "error"
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and self.channels_per_group is not None:
            raise OptionError(Text(Fix("groups"), " and ", Fix("channels_per_group"), " exclude each other"))
        for name, value in (("groups", self.groups), ("channels_per_group", self.channels_per_group)):
            if isinstance(value, str) and name == "groups" and value == "auto":
                continue
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise OptionError(
                    Text(Fix(name), f" must be a positive integer{' or auto' * (name == 'groups')}, got {value!r}")
                )
            object.__setattr__(self, name, value if value is None else int(value))
        one_of("indivisible", self.indivisible, INDIVISIBLE)
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if self.eps is not None and not (number and 0 <= self.eps < float("inf")):
            raise OptionError(Text(Fix("eps"), f" must be a finite number >= 0, got {self.eps!r}"))


@dataclass(frozen=True)
class Options:
    """Options of one layer of one target, fitted to it. Subclasses add what the target needs; all JSON values.

    eps: the value added to the variance; None keeps the target's own rule (see each norm's page).
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        if self.eps is not None and not self.eps >= 0:
            raise OptionError(f"eps must be >= 0, got {self.eps!r}")

    def misfit(self, channels: int) -> str | None:
        """Why they do not suit a layer of so many channels; None where they do."""
        return None


class DoesNotFit(Exception):
    """A request does not fit one layer. `plan` collects these, so that all of them are reported at once."""

    def __init__(self, reason: str, *, divisibility: bool = False) -> None:
        self.divisibility = divisibility
        super().__init__(reason)


def _fit_nothing(state: NormState, request: NormRequest) -> Options:
    return Options(eps=request.eps)


STATISTICS = ("sample", "batch", "fixed")


@dataclass(frozen=True)
class NormSpec:
    """One norm type: how to recognise, read and build it, and all that is particular to it.

    name: the word used in commands and rules; aliases: what people call it, in lower case without hyphens.
    read: a module's state, build: a module from a state and options (None: a source only).
    options, fit: what one layer needs beyond eps, and how the request becomes that.
    classes: module classes recognised exactly; class_names: the same, as `module.QualName`, for libraries that may not
    be installed; matches: recognises by structure.
    attributes: what its classes keep on an instance beside `eps` and `affine`; tensors: what they register beside
    gamma, beta and the running statistics. All else on a norm was put there by its user and stays.

    statistics: `sample`, computed from each sample at run time, so that running ones of the original have to be
    folded into what comes before; `batch`, running ones that follow the batches in training; `fixed`, running ones as
    they are at the conversion, for good.
    small_batch: whose samples its statistics suffer from if they are few: those of the `process`, of `all` processes.
    channel_dim: as in `NormState`, of what it builds. needs_dims: whether its class
    depends on the number of spatial dimensions. fuses: gamma, beta and all go into the layer before it; what is built
    is what remains where that cannot be.

    takes_groups: whether `groups` is for it. groups: into how many groups it splits channels, from a state, and from
    the options of a norm yet to be built; norms with as many groups compute the same. None: it alone computes what it
    does. elements: how many values one statistic is taken over, from (channels, positions, options).
    exact_from: types from which the conversion computes the same in eval mode, beside what `registry.exact_from` adds.
    centred_from: types that compute the same wherever the mean over the channels of their input is 0.
    """

    name: str
    title: str
    formula: str
    axes: str
    source: str
    read: Callable[[nn.Module], NormState]
    build: Callable[[NormState, Any], nn.Module] | None = None
    aliases: tuple[str, ...] = ()
    options: type[Options] = Options
    fit: Callable[[NormState, NormRequest], Options] = _fit_nothing
    classes: tuple[type[nn.Module], ...] = ()
    class_names: tuple[str, ...] = ()
    matches: Callable[[nn.Module], bool] | None = None
    attributes: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    statistics: str = "sample"
    small_batch: str | None = None
    channel_dim: int = 1
    needs_dims: bool = False
    fuses: bool = False
    takes_groups: bool = False
    groups: Callable[[NormState, Any], int | None] | None = None
    elements: Callable[[int, int, Any], int] | None = None
    exact_from: tuple[str, ...] = ()
    centred_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("statistics", self.statistics, STATISTICS)

    @property
    def per_sample(self) -> bool:
        """Whether statistics come from each sample at run time."""
        return self.statistics == "sample"

    @property
    def needs_statistics(self) -> bool:
        """Whether it cannot be without running statistics, and is a fixed map of each channel in eval mode."""
        return self.statistics != "sample"

    @property
    def updates_statistics(self) -> bool:
        """Whether its running statistics follow the batches, so that they can be estimated, and held."""
        return self.statistics == "batch"

    @property
    def fixed(self) -> bool:
        """Whether nothing of it trains: statistics, gamma and beta are those of the conversion."""
        return self.statistics == "fixed"
