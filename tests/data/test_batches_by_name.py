"""Batches that are dicts: each key the argument of its name, or a dict that the network takes whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomized, relative, run
from torch import Tensor, nn
from torch.utils.data import Dataset

import normswap
from normswap.comparison.layers import parts
from normswap.data.batches import as_batches
from normswap.data.one_batch import images_in


class Two(nn.Module):
    """Takes maps and how much of each counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, pixels: Tensor, scale: float = 1.0, mask: Tensor | None = None, **rest: Any) -> Tensor:
        x = torch.relu(self.norm(self.conv(pixels * scale)))
        x = x if mask is None else x * mask[:, None]
        return self.head(x.mean((2, 3)))


class Whole(Two):
    """Takes a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["frames"], mask=batch["valid"])


class PerImage(Two):
    """Takes a list of a dict for each image, as detectron2's networks do."""

    def forward(self, inputs: list[dict[str, Any]]) -> Tensor:
        return super().forward(torch.stack([one["image"] for one in inputs]))


PIXELS, MASK = torch.randn(12, 3, 6, 6), (torch.rand(12, 4, 4) > 0.4).float()
LABELS = torch.randint(4, (12,))


def dicts(names: tuple[str, str] = ("pixels", "mask")) -> list[dict[str, Any]]:
    pairs = zip(PIXELS.split(4), MASK.split(4), LABELS.split(4), strict=True)
    return [{names[1]: m, "labels": y, names[0]: x, "idle": "text"} for x, m, y in pairs]


def per_image() -> list[list[dict[str, Any]]]:
    return [[{"image": one, "height": 6} for one in part] for part in PIXELS.split(4)]


CASES: dict[str, tuple[Any, Any]] = {
    "by name": (Two, dicts()),
    "dict and labels": (Two, [({"pixels": d["pixels"], "mask": d["mask"]}, d["labels"]) for d in dicts()]),
    "whole": (Whole, dicts(("frames", "valid"))),
    "one for each image": (PerImage, per_image()),
}


def direct(net: nn.Module, kind: str) -> Tensor:
    if kind == "one for each image":
        return torch.cat([net(batch) for batch in per_image()])
    if kind == "whole":
        return net({"frames": PIXELS, "valid": MASK})
    return net(PIXELS, mask=MASK)


def networks(kind: str) -> tuple[nn.Module, nn.Module]:
    net = randomized(CASES[kind][0]()).eval()
    inputs = PIXELS[:2], 1.0, MASK[:2]
    example: Any = inputs if kind in ("by name", "dict and labels") else None
    return net, normswap.convert(net, "gn", groups=2, example_inputs=example, check=example is not None)


def test_arguments_go_to_the_names_that_forward_has() -> None:
    (args, labels), *_ = as_batches(dicts(), network=Two())
    assert torch.equal(args[0], PIXELS[:4])
    assert args[1] == 1.0
    assert torch.equal(args[2], MASK[:4])
    assert torch.equal(labels, LABELS[:4])
    assert len(args) == 3


def test_numbers_go_to_their_names_too() -> None:
    (args, _), *_ = as_batches([{"pixels": PIXELS, "scale": 3.0}], network=Two())
    assert args[1] == 3.0


def test_what_forward_takes_by_name_alone_is_refused_by_name() -> None:
    class Named(Two):
        def forward(self, pixels: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return super().forward(pixels, 1.0, mask)

    with pytest.raises(normswap.DataError, match="Named takes mask by name alone"):
        list(as_batches(dicts(), network=Named()))


def test_usual_names_go_on_meaning_the_input() -> None:
    (args, _), *_ = as_batches([{"image": PIXELS, "mask": MASK}], network=nn.Sequential(nn.Flatten()))
    assert len(args) == 1
    assert torch.equal(args[0], PIXELS)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("method", ["moments", "refit"])
def test_calibrating_sees_all_that_the_network_takes(kind: str, method: Any) -> None:
    net, model = networks(kind)
    with torch.no_grad():
        wanted, before = direct(net, kind), direct(model, kind)
        report = normswap.calibrate(model, data=CASES[kind][1], reference=net, method=method, images=10, progress=False)
        after = direct(model.eval(), kind)
    assert report.images == 10
    assert relative(wanted, after) < 0.8 * relative(wanted, before)
    assert (report.accuracy_after is not None) == (kind not in ("one for each image",))


@pytest.mark.parametrize("kind", CASES)
def test_verify_compares_what_the_networks_give(kind: str) -> None:
    net, model = networks(kind)
    report = normswap.verify(net, model, CASES[kind][1])
    with torch.no_grad():
        wanted = relative(direct(net, kind), direct(model, kind))
    assert report.images == 12
    assert report.outputs[0].error == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kind", CASES)
def test_distilling_comes_nearer(kind: str) -> None:
    net, model = networks(kind)
    report = normswap.distil(model, net, CASES[kind][1], steps=24, progress=False)
    assert report.drift_after < report.drift_before


def test_samples_of_a_dataset_may_be_dicts_too() -> None:
    class Samples(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"pixels": PIXELS[i], "mask": MASK[i]}

    net, model = networks("by name")
    normswap.calibrate(model, net, Samples(), batch_size=4, progress=False)
    report = normswap.distil(model, net, Samples(), steps=8, batch_size=4, progress=False)
    assert report.steps == 8
    assert run(model, PIXELS, 1.0, MASK).isfinite().all()


class Lengths(Two):
    """Needs the number of rows that count, for each image."""

    def forward(self, pixels: Tensor, rows: Tensor) -> Tensor:
        return super().forward(pixels, mask=(torch.arange(4) < rows[:, None])[:, :, None].float().expand(-1, 4, 4))


def test_as_many_tensors_as_the_forward_needs_are_all_inputs_and_one_more_the_labels() -> None:
    rows = torch.tensor([1, 2, 3, 4])
    network = randomized(Lengths())
    for batch in ((PIXELS[:4], rows), (PIXELS[:4], rows, LABELS[:4])):
        ((args, labels),) = as_batches([batch], network=network)
        assert [a is b for a, b in zip(args, batch, strict=False)] == [True, True]
        assert labels is None if len(batch) == 2 else torch.equal(labels, LABELS[:4])
    (args, labels), *_ = as_batches([(PIXELS[:4], LABELS[:4])], network=Two())
    assert len(args) == 1
    assert labels is not None
    report = normswap.verify(
        network, normswap.convert(network, "frozen", check=False), [(PIXELS[:4], rows, LABELS[:4])]
    )
    assert report.error < 1e-5
    assert report.labelled == 4


# --- graphs -----------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Adds to each node what its edges bring."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.second(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


EDGES = torch.randint(0, 40, (2, 90), generator=torch.Generator().manual_seed(1))
NODES = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))


def test_a_graph_is_of_one_piece_since_its_edges_count_its_nodes() -> None:
    assert images_in((NODES, EDGES)) == images_in((NODES, EDGES.T)) == images_in(({"x": NODES, "edges": EDGES},)) == 1
    ((args, labels),) = as_batches([((NODES, EDGES), torch.arange(40) % 4)])
    assert labels.shape == (40,)
    (part,) = parts(args, labels, 1)
    assert (len(part[0][0]), len(part[1])) == (40, 40)


def test_numbers_that_count_no_nodes_leave_a_batch_to_be_cut() -> None:
    for other in (torch.zeros(40, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), torch.zeros(2, 90)):
        assert images_in((NODES, other)) == 40
    assert images_in((EDGES,)) == 2
    words = torch.randint(0, 49_408, (10, 77), generator=torch.Generator().manual_seed(3))  # of ten texts
    assert images_in((NODES, words)) == 40


@pytest.mark.parametrize("batch", [((NODES, EDGES), torch.arange(40) % 4), {"x": NODES, "edges": EDGES}])
def test_a_network_is_calibrated_on_a_graph(batch: Any) -> None:
    model = randomized(Graph()).eval()
    made = normswap.convert(model, "gn", groups=2, example_inputs=(NODES, EDGES))
    before = relative(run(made, NODES, EDGES), run(model, NODES, EDGES))
    normswap.calibrate(made, model, [batch])
    assert relative(run(made, NODES, EDGES), run(model, NODES, EDGES)) < before
