"""The layer that gives a classifier's scores: finding it, and a new one for another number of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import module_at, replace_module
from .dense import resize_predictor

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Head:
    """Where the scores come from.

    path: a linear layer or 1x1 convolution with as many outputs as there are classes; for detectors and segmentation
    networks, what `find_predictor` finds.
    """

    path: str
    classes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `Head(**values)` is the inverse."""
        return {"path": self.path, "classes": self.classes}

    def renamed(self, rename: Callable[[str], str | None]) -> Head | None:
        """The same under another path; None where it is gone."""
        path = rename(self.path)
        return None if path is None else replace(self, path=path)

    def joined(self, other: Head) -> Head:
        """Of two parts with a new head, the first one's counts."""
        return self


def find_head(model: nn.Module, inputs: tuple[Any, ...]) -> Head:
    """The last linear layer or convolution to run that has as many outputs as the network gives scores.

    inputs: forward's arguments, one batch. Raises OptionError for a network that gives no scores `(N, K)`, or whose
    scores no such layer makes.
    """
    ran: list[tuple[str, int]] = []
    names = {m: n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    hooks = [m.register_forward_hook(lambda m, _, out: ran.append((names[m], _outputs(m)))) for m in names]
    try:
        with undisturbed(model), evaluating(model), torch.no_grad():
            scores = scores_of(model(*inputs))
    finally:
        for hook in hooks:
            hook.remove()
    found = next((path for path, outputs in reversed(ran) if outputs == scores.shape[1]), None)
    if found is None:
        raise NetworkError(
            f"no linear layer of the network gives its {scores.shape[1]} scores, so its head is not known",
            hint="Give the network its new head before it is converted.",
        )
    return Head(found, scores.shape[1])


def resize_head(model: nn.Module, head: Head) -> None:
    """Put a new layer for `head.classes` classes in the place of the old one, initialised as torch does.

    dtype, device, training flag and whether there is a bias stay. On the meta device no values are drawn.
    """
    old = module_at(model, head.path)
    if resize_predictor(old, head.classes):
        return
    if not isinstance(old, (nn.Linear, nn.Conv2d)):
        raise NetworkError(f"{head.path} is a {type(old).__name__}, not a linear layer or a convolution")
    if _outputs(old) == head.classes:
        return
    new = _resized(old, head.classes)
    new.train(old.training)
    replace_module(model, [head.path], new)
    for holder in (model, getattr(model, "config", None)):  # where timm and transformers note the number
        for name in ("num_classes", "num_labels"):
            if getattr(holder, name, None) == _outputs(old):
                setattr(holder, name, head.classes)


def _resized(old: Layer, classes: int) -> Layer:
    """Such a layer with another number of outputs."""
    more: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, **more)
    build: Any = nn.Conv2d  # whose stubs take no tuple of any length
    layer: Layer = build(old.in_channels, classes, old.kernel_size, old.stride, old.padding, old.dilation, **more)
    return layer


def scores_of(output: Any, *, per_pixel: bool = False) -> Tensor:
    """A network's scores in what its forward gives: the tensor itself, or its `logits`, or its `out`.

    `(N, K)` of a classifier; per_pixel: `(N, K, h, w)` of a segmentation network. Raises OptionError for anything else.
    Auxiliary outputs (GoogLeNet, Inception in train mode, `aux` of a segmentation) are left out.
    """
    dims, wanted = (
        (4, "segmentation network gives scores (N, classes, H, W)")
        if per_pixel
        else (2, "classifier gives scores (N, classes)")
    )
    read = output.get if isinstance(output, Mapping) else partial(getattr, output)
    parts = [found for found in (output, read("out", None), read("logits", None)) if isinstance(found, Tensor)]
    scores = next((found for found in parts if found.dim() == dims), None)
    if scores is None:
        got = f"a tensor of shape {tuple(parts[0].shape)}" if parts else type(output).__name__
        raise NetworkError(
            f"the network gives {got}; a {wanted}",
            hint="What gives something else is trained in a loop of your own, within normswap.stabilized(model).",
        )
    return scores


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(getattr(layer, "out_channels", 0))
