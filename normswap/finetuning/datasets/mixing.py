"""Pictures of a batch mixed with each other, and their labels with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019) of every training batch, by `torchvision.transforms.v2`.

    Where both are asked for, each batch gets one of them at random.

    mixup, cutmix: alpha of the Beta distribution that the share of the other picture is drawn from, by torch's random
    state; None for none.
    """

    mixup: float | None = None
    cutmix: float | None = None

    def __bool__(self) -> bool:
        return self.mixup is not None or self.cutmix is not None

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """inputs: `(N, C, H, W)`. Also the share of each of the N pictures in each that comes out, `(N, N)`.

        So the classes need not be known yet: the shares times the one-hot labels are the labels of what comes out.
        """
        from torchvision.transforms import v2

        count = len(inputs)
        kinds = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        asked = [(kind, alpha) for kind, alpha in kinds if alpha is not None]
        kind, alpha = asked[int(torch.randint(len(asked), ()))] if len(asked) > 1 else asked[0]
        mixed, shares = kind(alpha=alpha, num_classes=count)(inputs, torch.arange(count, device=inputs.device))
        return mixed, shares
