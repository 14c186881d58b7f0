"""Batch Renormalization (`renorm`). Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..modules.precision import at_least_float32
from ._building import read_statistics_norm
from ._wrappers import per_channel
from .batch import ATTRIBUTES, build_with_statistics
from .registry import register
from .spec import NormSpec, NormState, Options


@dataclass(frozen=True)
class RenormOptions(Options):
    """r_max, d_max: the final clips; warmup_steps: training steps over which they rise from 1 and 0 to there."""

    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r_max < 1 or self.d_max < 0 or self.warmup_steps < 0:
            raise OptionError("renorm needs r_max >= 1, d_max >= 0 and warmup_steps >= 0")


class BatchRenorm(nn.modules.batchnorm._BatchNorm):
    """Batch Renormalization on `(N, C, *)` of any dimensionality.

    Training: `x_hat = (x - mean_B) / std_B * r + d` with `r = clip(std_B / std, 1/r_max, r_max)` and
    `d = clip((mean_B - mean) / std, -d_max, d_max)`, where mean and std are the running ones; no gradient flows
    through r and d. Evaluation: as BatchNorm. With `r_max = 1, d_max = 0` training equals BatchNorm's.

    The clips rise linearly from (1, 0) over `warmup_steps` training steps, counted by `renorm_steps`. Running
    statistics follow torch: `running = (1 - momentum) * running + momentum * batch`, the variance unbiased.
    momentum=None averages cumulatively.
    """

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    renorm_steps: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5000,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.r_max, self.d_max, self.warmup_steps = r_max, d_max, warmup_steps
        self.register_buffer("renorm_steps", torch.zeros((), dtype=torch.long, device=device))

    def clips(self) -> tuple[Tensor, Tensor]:
        """The r_max and d_max in force now, as scalars on the module's device."""
        part = (self.renorm_steps / max(self.warmup_steps, 1)).clamp(max=1.0)
        part = torch.ones_like(part) if self.warmup_steps == 0 else part
        return 1 + (self.r_max - 1) * part, self.d_max * part

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"expected (N, C, *), got {x.dim()} dimensions")
        if not self.training or self.running_mean is None:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)
        axes = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"expected more than one value per channel in training, got input {tuple(x.shape)}")
        values = at_least_float32(x)
        var, mean = torch.var_mean(values, axes, correction=0)
        with torch.no_grad():
            r_max, d_max = self.clips()
            std = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / std).clamp(-d_max, d_max)
        scale = r / (var + self.eps).sqrt()
        y = (values - per_channel(mean, x.dim())) * per_channel(scale, x.dim()) + per_channel(d, x.dim())
        if self.weight is not None:
            y = y * per_channel(self.weight, x.dim())
        if self.bias is not None:
            y = y + per_channel(self.bias, x.dim())
        self._update(mean.detach(), var.detach() * count / (count - 1))
        return y.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.renorm_steps.add_(1)
        self.num_batches_tracked.add_(1)
        weight = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any dimensionality from `(N, C)` on."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}"


def _read(module: nn.Module) -> NormState:
    return read_statistics_norm(module, dims=None)


def _build(state: NormState, options: RenormOptions) -> nn.Module:
    module = build_with_statistics(BatchRenorm, state, options)
    module.r_max, module.d_max, module.warmup_steps = options.r_max, options.d_max, options.warmup_steps
    module.renorm_steps = module.renorm_steps.to(state.statistics[0].device)
    return module


register(
    NormSpec(
        name="renorm",
        title="Batch Renormalization",
        formula="training: y = ((x - mean_B) / std_B * r + d) * weight + bias, r and d clipped; eval: as bn",
        axes="N and positions, per channel",
        source="Ioffe 2017",
        read=_read,
        build=_build,
        options=RenormOptions,
        fit=lambda state, request: RenormOptions(eps=request.eps),
        classes=(BatchRenorm,),
        aliases=("batchrenorm",),
        attributes=(*ATTRIBUTES, "r_max", "d_max", "warmup_steps"),
        tensors=("renorm_steps",),
        statistics="batch",
    )
)
