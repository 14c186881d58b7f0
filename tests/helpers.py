"""What several tests share: networks with statistics worth testing, formulas, and proof that nothing changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.inspection.inventory import Inventory, inspect
from normswap.tracing.followed import known_here

needs_known_instructions = pytest.mark.skipif(not known_here(), reason="this Python's instructions are not known")


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In place: gamma, beta and running statistics as a trained network has them, biases not 0; in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std + mean
        tensor.data.copy_(values)

    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            normal(module.running_mean, 0.0, 0.7)
            module.running_var.data.copy_(torch.rand(module.running_var.shape, generator=generator) * 3 + 0.2)
            if isinstance(getattr(module, "num_batches_tracked", None), Tensor):
                module.num_batches_tracked.fill_(7)
        is_norm = hasattr(module, "running_var") or isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        if is_norm and getattr(module, "weight", None) is not None:
            normal(module.weight, 1.0, 0.4)
            normal(module.bias, 0.1, 0.5)
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            normal(module.bias, 0.0, 0.3)
        if hasattr(module, "refresh"):
            module.refresh()
    return model.eval()


def broadcast(vector: Tensor, x: Tensor) -> Tensor:
    """`(C,)` as `(1, C, 1, ...)` with as many dimensions as `x`."""
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` in float64, channel by channel of `(N, C, *)`."""
    y = (x.double() - broadcast(mean.double(), x)) / broadcast(var.double() + eps, x).sqrt()
    if weight is not None:
        y = y * broadcast(weight.detach().double(), x) + broadcast(bias.detach().double(), x)
    return y


def bn_eval(bn: nn.Module, x: Tensor) -> Tensor:
    """What a batch norm computes in eval mode, from its tensors, in float64."""
    return normalized(x, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


def grouped(x: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """GroupNorm of `(N, C, *)` by its definition, in float64."""
    parts = x.detach().double().reshape(x.shape[0], groups, -1)
    mean = parts.mean(-1, keepdim=True)
    var = ((parts - mean) ** 2).mean(-1, keepdim=True)
    y = ((parts - mean) / (var + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * broadcast(weight.detach().double(), x) + broadcast(bias.detach().double(), x)
    return y


def relative(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |a|` in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


@torch.no_grad()
def run(model: nn.Module, *inputs: Any) -> Tensor:
    """The model's output in eval mode, all its tensors in one; every module's training flag is restored."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        out = model(*inputs)
    finally:
        for module, flag in flags.items():
            module.training = flag
    leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    return torch.cat([t.reshape(-1) for t in leaves])


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an operation which promises to change nothing must leave as it was.

    Module objects and their classes, flags, attributes, hooks; Parameter objects, dtypes, flags and bits.
    """
    marks: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        marks[path, "module"] = (id(module), type(module), module.training)
        marks[path, "attributes"] = sorted((k, id(v)) for k, v in module.__dict__.items() if k != "training")
        marks[path, "children"] = [(k, id(v)) for k, v in module._modules.items()]
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                marks[path, name] = None if tensor is None else _tensor_marks(tensor)
        for name, value in module.__dict__.items():
            if "_hooks" in name:
                marks[path, name] = sorted(value)
            elif isinstance(value, (list, dict)) and not name.startswith("_"):
                marks[path, name, "items"] = [id(v) for v in (value.values() if isinstance(value, dict) else value)]
    return marks


def _tensor_marks(tensor: Tensor) -> tuple[Any, ...]:
    data = None if tensor.is_meta else bits(tensor)
    return id(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, data


def contents(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """The state dict, bit for bit."""
    return {name: (t.dtype, bits(t)) for name, t in model.state_dict().items()}


def classes(model: nn.Module) -> list[str]:
    """Class names of all modules, in order."""
    return [type(m).__name__ for m in model.modules()]


def conv_bn(channels: int = 8, *, bias: bool = False, dims: int = 2, **norm: Any) -> nn.Sequential:
    """A convolution, its BN with statistics worth testing, a ReLU: (N, 3, ...) -> (N, channels, ...)."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    bn = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return randomized(nn.Sequential(conv(3, channels, 3, padding=1, bias=bias), bn(channels, **norm), nn.ReLU()))


class Residual(nn.Module):
    """Two conv-BN pairs beside an identity; `(N, 4, H, W)`."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def paths_of(layers: Iterable[Any]) -> list[str]:
    """The `path` of each."""
    return [layer.path for layer in layers]


# --- what feeds what ------------------------------------------------------------------------------------------------

MODES = ["symbolic", "recorded"]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution and a BN, `(N, 3, H, W)` to `(N, 4, H, W)`; made to be subclassed with another forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def look(net: nn.Module, mode: str, x: Tensor = X) -> Inventory:
    """What a symbolic or a recorded run shows of the network in eval mode."""
    return inspect(net.eval(), x if mode == "recorded" else None)


def edges(net: nn.Module, mode: str, x: Tensor = X) -> dict[str, tuple[str, ...]]:
    """The foldable norms and the layers that feed them."""
    layers = look(net, mode, x).layers
    assert all(bool(layer.feed.producers) == layer.feed.foldable == (not layer.feed.reason) for layer in layers)
    return {layer.path: layer.feed.producers for layer in layers if layer.feed.foldable}
