"""The matrix of conversions: every cell is carried out, on networks built here, and does what the cell says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomized
from torch import Tensor, nn

import normswap
from normswap.errors import PlanError
from normswap.norms.frozen import FrozenBatchNorm
from normswap.norms.instance_adaptive import AdaptiveInstanceNorm
from normswap.norms.layer import ChannelLayerNorm
from normswap.norms.registry import specs
from normswap.norms.renorm import BatchRenorm
from normswap.norms.rms_channel import ChannelRMSNorm
from normswap.planning.matrix import Conversion, all_conversions, conversions, notes

C = 12
NORMS: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.BatchNorm2d(C),
    "sync": lambda: nn.SyncBatchNorm(C),
    "frozen": lambda: FrozenBatchNorm(C),
    "gn": lambda: nn.GroupNorm(3, C),
    "in": lambda: nn.InstanceNorm2d(C, affine=True),
    "adain": lambda: AdaptiveInstanceNorm(C),
    "ln": lambda: nn.LayerNorm(C),
    "ln-channel": lambda: ChannelLayerNorm(C),
    "renorm": lambda: BatchRenorm(C),
    "rms": lambda: nn.RMSNorm(C, eps=1e-5),
    "rms-channel": lambda: ChannelRMSNorm(C),
}
ALL = all_conversions()
GROUPS = {"gn": 3, "in": C, "adain": C}  # of the norms above


def network(source: str, layout: str) -> tuple[nn.Module, Tensor]:
    random = torch.Generator().manual_seed(3)
    if layout == "images":
        layers = [nn.Conv2d(3, C, 3), NORMS[source](), nn.SiLU(), nn.Conv2d(C, 5, 1)]
        return settled(layers), torch.randn(8, 3, 6, 6, generator=random)
    layers = [nn.Linear(3, C), NORMS[source](), nn.Linear(C, 5)]
    return settled(layers), torch.randn(8, 7, 3, generator=random)


def settled(layers: list[nn.Module]) -> nn.Module:
    """With gammas, betas and statistics that show, the caches of a frozen norm too."""
    net = randomized(nn.Sequential(*layers)).eval()
    for module in net:
        if isinstance(module, FrozenBatchNorm):
            module.refresh()
    return net


def drift(net: nn.Module, made: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        before, after = net.eval()(x), made.eval()(x)
    return float((after - before).norm() / before.norm())


def options_of(cell: Conversion) -> dict[str, Any]:
    """What the cell says it takes, for the norms of this file."""
    return {**cell.options, "groups": GROUPS[cell.source]} if "groups" in cell.options else cell.options


@pytest.mark.parametrize("cell", ALL, ids=lambda c: f"{c.source}-to-{c.target}")
def test_a_conversion_does_what_its_cell_says(cell: Conversion) -> None:
    net, x = network(cell.source, cell.layout)
    asked: dict[str, Any] = {"sources": [cell.source], "example_inputs": x, **options_of(cell)}
    if cell.outcome in ("refused", "needs images"):
        with pytest.raises(PlanError):
            normswap.convert(net, cell.target, **asked)
    if cell.outcome == "refused":
        with pytest.raises(PlanError):
            normswap.convert(net, cell.target, missing_statistics="later", **asked)
    elif cell.outcome == "needs images":
        made = normswap.convert(net, cell.target, missing_statistics="later", **asked)
        report = normswap.calibrate(made, net, x)
        assert report.drift_after < min(0.9, report.drift_before)
    else:
        moved = drift(net, normswap.convert(net, cell.target, **asked), x)
        assert moved < 1e-5 if cell.outcome == "exact" else 1e-4 < moved < 2


def test_there_is_a_cell_for_every_norm_that_can_be_read_and_every_target() -> None:
    names = [spec.name for spec in specs()]
    assert [(c.source, c.target) for c in ALL] == [(s, t) for s in names if s != "fused" for t in names]
    assert set(NORMS) == {c.source for c in ALL}
    assert {str(c.outcome) for c in ALL} == {"exact", "close", "needs images", "refused"}


def test_a_row_and_a_column_are_those_of_the_whole() -> None:
    gn = tuple(spec for spec in specs() if spec.name == "gn")
    assert conversions(gn, specs()) == [c for c in ALL if c.source == "gn"]
    assert conversions(specs(), gn) == [c for c in ALL if c.target == "gn"]


def test_what_is_exact_under_a_condition_is_said_and_so() -> None:
    cells = {(c.source, c.target): c for c in ALL}
    assert cells["gn", "ln"].note == "exact from one group"
    assert cells["gn", "in"].note == "exact from one channel a group"
    for target, groups in (("ln", 1), ("in", C)):
        net = settled([nn.Conv2d(3, C, 1), nn.GroupNorm(groups, C)])
        x = torch.randn(2, 3, 4, 4)
        assert drift(net, normswap.convert(net, target, example_inputs=x), x) < 1e-5


@pytest.mark.parametrize("cell", [c for c in ALL if "vectors" in c.note], ids=lambda c: f"{c.source}-to-{c.target}")
def test_what_is_refused_of_images_and_tokens_may_be_possible_on_vectors(cell: Conversion) -> None:
    made = {"bn": nn.BatchNorm1d, "sync": nn.SyncBatchNorm}.get(cell.source)
    norm = NORMS[cell.source]() if made is None else made(C)
    net, x = settled([nn.Linear(3, C), norm, nn.Linear(C, 5)]), torch.randn(16, 3)
    later = "later" if cell.note.startswith("needs images") else "error"
    changed = normswap.convert(net, cell.target, sources=[cell.source], example_inputs=x, missing_statistics=later)
    assert type(changed[1]) is not type(norm)


def test_notes_gather_the_sources_of_like_targets() -> None:
    def cell(source: str, target: str, note: str) -> Conversion:
        return Conversion(source, target, ALL[0].outcome, "images", note=note)

    cells = [cell("a", "x", "n"), cell("a", "y", "n"), cell("b", "x", "n"), cell("b", "y", "n"), cell("c", "x", "m")]
    assert notes([*cells, cell("c", "y", "")]) == ["a, b to x, y: n.", "c to x: m."]
