"""What zoo.py looks at in one network."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from coverage import output_error, randomise_statistics
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import normswap
from normswap.conversion.self_check import _double as double
from normswap.conversion.self_check import repeats
from normswap.inspection.inventory import inventory_of
from normswap.modules.restore import evaluating, seed_everything
from normswap.modules.tree import copied
from normswap.planning.options import PlanOptions
from normswap.planning.planner import planned


@dataclass
class Row:
    """What was found of one network. held: norms with batch statistics, counted without normswap; named: those of them
    that `inspect` names as not to be converted."""

    package: str
    network: str
    held: int = 0
    found: int = 0
    named: int = 0
    missed: list[str] = field(default_factory=list)
    folded: int = 0
    folded_with: int = 0
    left_running: int = 0
    error: float = 0.0
    reverted: bool = False
    loaded: bool = False
    calibrated: bool = False
    random: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


# --- inputs and modules that zoo_networks.txt names --------------------------------------------------------------


def noise(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def image(side: int, channels: int = 3) -> tuple[Tensor]:
    return noise(1, channels, side, side)


def volume(side: int = 32) -> tuple[Tensor]:
    return noise(1, 1, side, side, side)


def graph() -> tuple[Tensor, Tensor]:
    """20 nodes of 16 features, 60 edges."""
    return (*noise(20, 16), torch.randint(0, 20, (2, 60), generator=torch.Generator().manual_seed(0)))


class Typed(nn.Module):
    """A layer, and a norm that is told of which of three types each row is."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x), torch.arange(len(x)) % 3)


def known_after(setup: str) -> dict[str, Any]:
    """The names that a package's lines use."""
    own = {"torch": torch, "nn": nn, "image": image, "noise": noise, "volume": volume, "graph": graph, "Typed": Typed}
    known = dict(own)
    exec(setup, known)
    return known | own  # a package may export something by the same name


def made(line: tuple[str, str], known: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network in eval mode, and the positional arguments of its forward."""
    torch.manual_seed(0)
    model = eval(line[0], known)
    model.eval()
    randomise_statistics(model)
    return model, eval(line[1], known)


# --- one network ------------------------------------------------------------------------------------------------------


def held_in(model: nn.Module) -> set[str]:
    """Paths of the modules that keep batch statistics, told by torch's base class and by their buffers."""
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        or any(name.endswith(("running_var", "moving_var", "moving_variance")) for name in module._buffers)
    } - {path for path, module in model.named_modules() if isinstance(module, nn.modules.instancenorm._InstanceNorm)}


class Counting(TorchDispatchMode):
    """Counts batch norms that run with fixed statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "batch_norm" in name and "backward" not in name:
            self.count += "no_training" in name or not args[5]
        return func(*args, **(kwargs or {}))


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        seed_everything(model)
        return [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def examined(row: Row, line: tuple[str, str], known_names: dict[str, Any]) -> Row:
    start = time.perf_counter()
    model, inputs = made(line, known_names)
    inventory = normswap.inspect(model, feeds=False)
    layers = {x.path: x for x in inventory.layers if x.spec.needs_statistics}
    suspects, held = {x.path for x in inventory.suspects}, held_in(model)
    known = {path for x in layers.values() for path in (x.path, *x.aliases)}
    row.held, row.found, row.named = len(held | set(layers)), len(layers), len((held & suspects) - known)
    row.missed = sorted(held - known - suspects)
    if not layers:
        row.seconds = time.perf_counter() - start
        return row
    alone, fed = inventory_of(model), inventory_of(model, inputs)
    rules = dict.fromkeys(suspects, "keep")
    try:
        row.folded = folded(planned(model, PlanOptions("gn", indivisible="nearest", rules=rules), alone))
    except normswap.NormswapError as error:
        row.problems.append(f"without inputs: {told(error)}")
    grouped = planned(model, PlanOptions("gn", indivisible="nearest", rules=rules, example_inputs=inputs), fed)
    row.folded_with = folded(grouped)
    row.reasons = dict(Counter(x.feed.reason for x in fed.layers if x.path in layers and not x.feed.foldable))
    fused = planned(model, PlanOptions("fused", rules=rules), alone)
    row.random = not repeats(model, inputs, [])
    for step, plan in ((exactly, fused), (round_trip, grouped), (repaired, grouped)):
        try:
            step(row, model, inputs, plan)
        except Exception as error:
            row.problems.append(f"{step.__name__}: {told(error)}")
    row.seconds = time.perf_counter() - start
    return row


def folded(plan: normswap.Plan) -> int:
    return sum(step.transfer == "fold" for step in plan.steps)


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def exactly(row: Row, model: nn.Module, inputs: Any, plan: normswap.Plan) -> None:
    """Convert to `fused`, which must be the same network."""
    fused = normswap.convert(model, using=plan, example_inputs=inputs, check=not row.random)
    with Counting() as counting:
        outputs(fused, inputs)
    row.left_running = counting.count
    if not row.random:
        row.error = output_error(model, fused, plan, inputs)
        if not row.error < 1e-4:  # random weights can blow rounding up; float64 tells it from a real difference
            wide = copied(model).double()
            fused = normswap.convert(wide, using=plan, check=False)
            row.error = output_error(wide, fused, plan, double(inputs))
        if not row.error < 1e-4:
            row.problems.append(f"fused differs by {row.error:.1e}")


def round_trip(row: Row, model: nn.Module, inputs: Any, plan: normswap.Plan) -> None:
    """Save, load into a copy of the original, and revert."""
    gn = normswap.convert(model, using=plan, example_inputs=inputs, check=not row.random)
    with tempfile.TemporaryDirectory() as folder:
        normswap.save(gn, Path(folder, "gn.safetensors"))
        loaded = normswap.load(Path(folder, "gn.safetensors"), copied(model))
    row.loaded = same(gn.state_dict().values(), loaded.state_dict().values())
    row.loaded &= row.random or same(outputs(gn, inputs), outputs(loaded, inputs))
    before, after = model.state_dict(), normswap.revert(loaded).state_dict()
    row.reverted = list(before) == list(after) and same(before.values(), after.values())


def repaired(row: Row, model: nn.Module, inputs: Any, plan: normswap.Plan) -> None:
    """Calibrate on the inputs."""
    gn = normswap.convert(model, using=plan, check=False)
    data = [(inputs, torch.zeros(1)) if len(inputs) > 1 else inputs[0]]
    normswap.calibrate(gn, model, data, method="balance")
    found = [t for t in outputs(gn, inputs) if t.is_floating_point()]
    fine = [t for t in outputs(model, inputs) if t.is_floating_point()]
    row.calibrated = all(t.isfinite().all() for t in gn.state_dict().values())
    row.calibrated &= all(bool(a.isfinite().all() or not b.isfinite().all()) for a, b in zip(found, fine, strict=False))
