"""Fit the layer before each norm anew, so that from what now enters it, it gives what the original's layer gave.

Matching moments corrects two numbers of a channel. Where small groups have changed a layer's input, much of the error
is still linear in that input, and the layer before the norm can take it out: ridge regression of the original's
standardised value before the norm on the inputs that the converted network has there, towards the present weights.
One small system for each layer, from the same few images (as in layer-wise reconstruction of quantized networks:
Nagel et al. 2020, "AdaRound"; Hubara et al. 2021, "AdaQuant"; here without rounding, so in closed form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversion.exact_scaling import layer_digest, undo_layer
from ..conversion.undo_record import LayerUndo
from ..modules.tree import module_at
from ..planning.plan import Step, Transfer
from .norm_targets import Target, first_input

RIDGE = 0.1
"""Of the mean power of an input: how strongly a weight is held where it is."""
ROWS = 64
"""How many positions are used for each number to be fitted, at least, as far as there are so many."""
_ON_REGIONS = {"roi_heads", "roi_head"}
_AT_ONCE = 1 << 24  # numbers in the patches that are laid out at a time


@dataclass(eq=False)
class Refit:
    """A layer to fit, and what has arrived for it: by batch, its inputs, and the original's value before the norm.

    scale, shift: what folding and balancing have multiplied the original layer's output with and added, `(C,)`.
    """

    path: str
    layer: Any
    target: Target
    record: LayerUndo
    inputs: dict[int, Tensor] = field(default_factory=dict)
    wanted: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, job: Callable[[], int], arrive: Callable[[], None], batches: int) -> Iterator[None]:
        """Stop both networks before the norm, in all jobs, until the layer is fitted.

        job: gives the number of the one that runs; from `batches` on they are the original's.
        """

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs[job()] = first_input(args, kwargs)

        def given(module: nn.Module, args: Any, kwargs: Any) -> Any:
            i = job()
            arrive()
            return (self._again(i),), {}

        def wanted(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.wanted[job() - batches] = first_input(args, kwargs)
            arrive()

        with ExitStack() as stack:
            hooks: tuple[tuple[Any, Any], ...] = (
                (self.layer, entering),
                (self.target.norm, given),
                (self.target.original, wanted),
            )
            for module, hook in hooks:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def undo(self) -> LayerUndo:
        """How to get the layer back to what it was before the conversion."""
        return replace(self.record, given=layer_digest(self.layer))

    @torch.no_grad()
    def solve(self) -> None:
        """Set weight and bias. What the original gave is not needed any more."""
        wanted, self.wanted = self.wanted, {}
        batches = [(x, wanted[i]) for i, x in self.inputs.items() if i in wanted and len(x)]
        if batches and not (isinstance(self.layer, nn.Linear) and batches[0][0].dim() != 2):
            with torch.autocast(self.layer.weight.device.type, enabled=False):
                weight, bias = fitted(self.layer, batches, self.record.scale, self.record.shift)
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(bias)

    def _again(self, i: int) -> Tensor:
        """What the layer makes of its input in batch i now."""
        out: Tensor = self.layer.forward(self.inputs.pop(i))
        return out


def refits_of(
    model: nn.Module, targets: Iterable[Target], steps: Mapping[str, Step], records: Mapping[str, LayerUndo]
) -> dict[str, Refit]:
    """Of the norms at these paths, those whose layer can be fitted: folded into a single plain convolution or linear
    layer, which has not been trained since and runs no hooks. What runs on regions that the network itself proposes is
    left out: both networks see regions of their own there, which cannot be compared one by one."""
    found = {}
    for target in targets:
        if not _ON_REGIONS.isdisjoint(target.path.split(".")):
            continue
        step = steps.get(target.path)
        if step is None or step.transfer is not Transfer.FOLD or len(step.producers) != 1 or target.original is None:
            continue
        layer, record = module_at(model, step.producers[0]), records.get(step.producers[0])
        original = undo_layer(layer, record) if record is not None and can_fit(layer) else None
        if record is not None and original is not None:
            kept = LayerUndo(record.path, record.scale, record.shift, record.bias, weight=original[0].clone())
            found[target.path] = Refit(record.path, layer, target, kept)
    return found


def can_fit(layer: nn.Module) -> bool:
    """Whether the layer is a sum over patches of its input: torch's own convolution (1d, 2d) or linear layer."""
    own = isinstance(layer._parameters.get("weight"), nn.Parameter) and layer._parameters.get("bias") is not None
    plain = own and not layer._forward_hooks and not layer._forward_pre_hooks
    if isinstance(layer, nn.Linear):
        return plain
    convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d)) and type(layer).forward in _FORWARDS
    return plain and convolution and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward)


def fitted(layer: Any, batches: list[tuple[Tensor, Tensor]], scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimise `||layer(x) - (scale z + shift)||^2 + ridge ||weight - weight_now||^2`.

    batches: pairs of the layer's input x and the original layer's output z, `(N, C, *)` each. Sums over
    few images each are pooled in float64; positions lie on a regular grid of each image, whatever its batch.
    """
    groups = getattr(layer, "groups", 1)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    now = torch.cat([weight.reshape(groups, -1, weight[0].numel()), bias.view(groups, -1, 1)], 2).float()
    size = now.shape[2]
    wanted = -(-ROWS * size // sum(len(x) for x, _ in batches))
    gram = torch.zeros(groups, size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(now.shape, dtype=torch.float64, device=weight.device)
    for x, z in batches:
        count = max(1, _AT_ONCE // max(1, size * groups * z[0, 0].numel()))
        for part, out in zip(x.split(count), z.split(count), strict=True):
            value = out.float().flatten(2) if out.dim() > 2 else out.float().unsqueeze(2)
            at = _grid(value.shape[2], wanted).to(value.device)
            rows = _patches(layer, part.float(), at, groups)
            aim = (value[..., at] * _column(scale, value) + _column(shift, value)).movedim(1, 0)
            error = aim.reshape(groups, -1, rows.shape[2]) - now @ rows
            gram += (rows @ rows.mT).double()
            cross += (error @ rows.mT).double()
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        return weight, bias
    power = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None].clamp_min(1e-30)
    held = torch.cat([RIDGE * power.expand(-1, size - 1), 1e-6 * power], 1)  # the bias is free
    change = torch.linalg.solve((gram + torch.diag_embed(held)).cpu(), cross.mT.cpu()).mT.to(gram.device)
    new = now + change
    return new[..., :-1].reshape(weight.shape).to(weight.dtype), new[..., -1].reshape(-1).to(bias.dtype)


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like)[:, None]


def _grid(positions: int, wanted: int) -> Tensor:
    """Indices of so many positions, evenly spread; all of them where there are fewer."""
    count = min(positions, wanted)
    return torch.arange(count) * positions // max(count, 1)


def _patches(layer: Any, x: Tensor, at: Tensor, groups: int) -> Tensor:
    """What the layer sums over at some positions, and a 1: `(groups, inputs + 1, N * positions)`."""
    if isinstance(layer, nn.Linear):
        found = x.unsqueeze(2)
    else:
        wide = layer if x.dim() == 4 else None
        sizes = ("kernel_size", "dilation", "padding", "stride")
        kernel, dilation, padding, stride = (
            getattr(layer, s) if wide else (int(s in ("kernel_size", "dilation", "stride")), *getattr(layer, s))
            for s in sizes
        )
        found = F.unfold(x if wide else x.unsqueeze(2), kernel, dilation, padding, stride)
    found = found[..., at].movedim(1, 0)  # (inputs, N, positions)
    rows = found.reshape(groups, -1, found.shape[1] * found.shape[2])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
