"""Networks and comparisons that the tests of calibration share."""

from __future__ import annotations

from typing import Any

import torch
from helpers import Residual, run
from torch import Tensor, nn

from normswap.conversion.apply import inner_norm
from normswap.conversion.record import record_of
from normswap.modules.tree import module_at


class Net(nn.Module):
    """Convolutions with BN, two residual blocks whose ReLU works in place, a classifier: (N, 3, H, W) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.body = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def images(count: int = 12, size: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator) * 1.5 + 0.3


@torch.no_grad()
def trained(model: nn.Module, data: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(data)
    return model.eval()


def outputs(model: nn.Module, paths: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """What the norms at these paths give over all batches, `(values, C)` float64, taken inside a hook.

    With the channels in the order of the original, which regrouping may have changed.
    """
    record = record_of(model)
    orders = {} if record is None else {order.path: order.rows for order in record.undo.orders}
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def hook(module: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
            seen[path].append(out.detach().double().movedim(1, -1).flatten(0, -2).clone())

        handles.append(inner_norm(module_at(model, path)).register_forward_hook(hook))
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    found = {path: torch.cat(values) for path, values in seen.items()}
    for path, values in found.items():
        if (rows := orders.get(path)) is not None:
            found[path] = torch.empty_like(values)
            found[path][:, rows] = values
    return found


def assert_same_moments(model: nn.Module, reference: nn.Module, batches: list[Any], tolerance: float = 1e-4) -> None:
    paths = [step.path for step in record_of(model).plan.steps]
    new, old = outputs(model, paths, batches), outputs(reference, paths, batches)
    for path in paths:
        size = old[path].std(0, correction=0).square().mean().sqrt()
        alive = old[path].std(0, correction=0) > 1e-5 * size
        mean = (new[path].mean(0) - old[path].mean(0)).abs().max() / size
        std = (new[path].std(0, correction=0) - old[path].std(0, correction=0))[alive].abs().max() / size
        assert mean < tolerance, path
        assert std < tolerance, path


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone().double() for name, t in model.state_dict().items()}


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    one, other = tensors(a), tensors(b)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


@torch.no_grad()
def run_at(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)
