"""Data of every form: sequences with lengths, dicts, several arguments; what `calibrate` takes, all commands take."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomized
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

import normswap
from normswap.data.one_batch import Forward
from normswap.errors import DataError
from normswap.finetuning.datasets.batched import given_batches, loaded

pytestmark = pytest.mark.filterwarnings("ignore:.* takes statistics over time")  # of how data is read, not of padding

COUNT = 24
LENGTHS = torch.arange(COUNT) % 5 + 4
LABELS = torch.arange(COUNT) % 3
X = torch.randn(COUNT, 4, 8, generator=torch.Generator().manual_seed(0)) + 2 * LABELS[:, None, None]


class Sequences(nn.Module):
    """A classifier of sequences: the mean over their steps that count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert lengths is not None, "the lengths were left out"
        assert lengths.shape == x.shape[:1]
        valid = (torch.arange(x.shape[2]) < lengths[:, None]).to(x)[:, None]
        x = torch.relu(self.norm(self.conv(x))) * valid
        return self.head(x.sum(2) / lengths[:, None])


class Needs(Sequences):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x, lengths)


class TakesDicts(Sequences):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["steps"], batch["count"])


class Uneven(Dataset[Any]):
    """Sequences of their own lengths, and what pads them."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i, :, : int(LENGTHS[i])], int(LABELS[i])

    @staticmethod
    def padded(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        x = pad_sequence([x.T for x, _ in items], batch_first=True).transpose(1, 2)
        return x, torch.tensor([x.shape[1] for x, _ in items]), torch.tensor([y for _, y in items])


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "lengths": int(LENGTHS[i]), "labels": int(LABELS[i])}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([Dicts()[i] for i in range(COUNT)])


def batches(size: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(X.split(size), LENGTHS.split(size), LABELS.split(size), strict=True))


FORMS: dict[str, tuple[type[nn.Module], Any]] = {
    "a Dataset of (x, lengths, y)": (Sequences, TensorDataset(X, LENGTHS, LABELS)),
    "one for a forward that needs both": (Needs, TensorDataset(X, LENGTHS, LABELS)),
    "a Dataset of dicts": (Sequences, Dicts()),
    "a DataLoader": (Sequences, DataLoader(TensorDataset(X, LENGTHS, LABELS), batch_size=6)),
    "a DataLoader with its own collate_fn": (Sequences, DataLoader(Uneven(), 6, collate_fn=Uneven.padded)),
    "a list of (x, lengths, y)": (Sequences, batches()),
    "a list of ((x, lengths), y)": (Sequences, [((x, n), y) for x, n, y in batches()]),
    "a list of dicts": (Sequences, [{"x": x, "lengths": n, "labels": y} for x, n, y in batches()]),
    "a dict": (Sequences, {"x": X, "lengths": LENGTHS, "labels": LABELS}),
    "dicts that the network takes whole": (
        TakesDicts,
        [({"steps": x, "count": n}, y) for x, n, y in batches()],
    ),
}


def network(kind: type[nn.Module]) -> nn.Module:
    return randomized(kind()).eval()


def scores(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net({"steps": X, "count": LENGTHS}) if isinstance(net, TakesDicts) else net(X, LENGTHS)


IN_DOCS: dict[str, Any] = {
    "a pair of tensors, (x, y)": None,
    "a Dataset of (x, y), (x, lengths, y), ((x, lengths), y) or dicts": Dicts(),
    "a DataLoader, with its own `collate_fn` or not": FORMS["a DataLoader with its own collate_fn"][1],
    "a list of batches (x, y), (x, lengths, y), ((x, lengths), y) or dicts": batches(),
    "one dict, which is one batch": FORMS["a dict"][1],
    "a generator of batches": "generator",
    "an IterableDataset of samples": Streamed(),
}


class Plain(Sequences):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.full((len(x),), x.shape[2]) if lengths is None else lengths)


def rows() -> list[list[str]]:
    text = (Path(__file__).parents[2] / "docs/finetuning.md").read_text().split("## Forms of data")[1].split("## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_table_in_the_docs_is_what_the_commands_take() -> None:
    (_, *commands), *table = rows()
    assert [name for name, *_ in table] == ["a folder of images", *IN_DOCS]
    for name, *cells in table[1:]:
        for command, said in zip(commands, cells, strict=True):
            net = network(Sequences if IN_DOCS[name] is not None else Plain)
            given = ((x, n, y) for x, n, y in batches()) if IN_DOCS[name] == "generator" else IN_DOCS[name]
            data = (X, LABELS) if given is None and command not in ("`calibrate`", "`verify`", "`distil`") else given
            data = [{"x": X, "labels": LABELS}] if data is None else data
            made = normswap.convert(net, "gn", groups=2, check=False)
            calls = {
                "`calibrate`": lambda: normswap.calibrate(made, net, data, method="moments", progress=False),  # noqa: B023
                "`verify`": lambda: normswap.verify(net, made, data),  # noqa: B023
                "`distil`": lambda: normswap.distil(made, net, data, steps=1, progress=False),  # noqa: B023
                "`evaluate`": lambda: normswap.evaluate(net, data),  # noqa: B023
                "`finetune`": lambda: normswap.finetune(net, data, steps=1, device="cpu", progress=False),  # noqa: B023
            }
            try:
                calls[command]()
            except normswap.NormswapError:
                assert said == "no", f"{command} takes {name}"
            else:
                assert said != "no", f"{command} does not take {name}"


NOT_DRAWN_ANEW = "dicts that the network takes whole"


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_takes_what_calibrate_takes(form: str) -> None:
    kind, data = FORMS[form]
    net = network(kind)
    report = normswap.evaluate(net, data, batch_size=5)
    right = scores(net).argmax(1) == LABELS
    assert (report.images, report.score[1]) == (COUNT, pytest.approx(right.float().mean().item()))
    made = normswap.convert(net, "gn", groups=2, check=False)
    normswap.calibrate(made, net, data, method="moments", progress=False)
    compared = normswap.verify(net, made, data)
    assert (compared.images, compared.labelled) == (COUNT, COUNT)
    assert compared.accuracy_a == pytest.approx(report.score[1])


@pytest.mark.parametrize("form", [form for form in FORMS if form != NOT_DRAWN_ANEW])
def test_finetune_takes_what_calibrate_takes(form: str) -> None:
    kind, data = FORMS[form]
    net = network(kind)
    report = normswap.finetune(
        net, data, data, batch_size=4, epochs=4, lr=0.03, workers=0, device="cpu", progress=False
    )
    right = (scores(net.eval()).argmax(1) == LABELS).float().mean().item()
    assert report.steps == 24
    assert report.figures["val_accuracy"] == pytest.approx(right)
    assert right > 0.6  # guessing is 1/3


@pytest.mark.parametrize("form", FORMS)
def test_distil_takes_what_calibrate_takes(form: str) -> None:
    kind, data = FORMS[form]
    net = network(kind)
    made = normswap.convert(net, "gn", groups=2, check=False)
    assert normswap.distil(made, net, data, steps=2, batch_size=4, progress=False).steps == 2


def test_streams_are_measured_but_not_trained_on() -> None:
    net = network(Sequences)
    wanted = normswap.evaluate(net, Dicts()).score
    assert normswap.evaluate(net, Streamed()).score == wanted
    assert normswap.evaluate(net, (batch for batch in batches())).score == wanted
    with pytest.raises(normswap.DataError, match="Streamed, which has no order of its own"):
        normswap.finetune(net, Streamed(), device="cpu")


def test_a_loader_is_measured_as_it_is() -> None:
    chosen = [0, 3, 6, 9, 12]
    loader = DataLoader(TensorDataset(X, LENGTHS, LABELS), batch_size=2, sampler=SubsetRandomSampler(chosen))
    net = network(Sequences)
    report = normswap.evaluate(net, loader)
    right = (scores(net).argmax(1) == LABELS)[chosen]
    assert (report.images, report.score[1]) == (5, pytest.approx(right.float().mean().item()))
    assert normswap.evaluate(net, loader, images=3).images == 3


def test_progress_counts_a_loaders_batches() -> None:
    told: list[tuple[int, int]] = []
    normswap.evaluate(network(Sequences), FORMS["a DataLoader"][1], progress=lambda *now: told.append(now))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_part_of_a_loaders_samples_is_what_trains() -> None:
    seen: list[int] = []

    class Watched(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            seen.append(i)
            return super().__getitem__(i)

    loader = DataLoader(Watched(X, LENGTHS, LABELS), batch_size=4, sampler=SubsetRandomSampler([0, 1, 2, 3, 4, 5]))
    normswap.finetune(network(Sequences), loader, batch_size=2, epochs=1, device="cpu", progress=False)
    assert set(seen) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"batch_size": 4}, None),
        ({"batch_size": 6}, r"batches have 4 samples \(batch_size\), not the DataLoader's 6"),
        ({"batch_sampler": [[0, 1], [2, 3]]}, "its batch_sampler is not used"),
        ({"batch_size": 4, "sampler": [5, 4, 3, 2]}, "drawn at random from the DataLoader's data set; its list is not"),
    ],
)
def test_what_a_run_does_otherwise_than_a_loader_is_told(options: dict[str, Any], note: str | None) -> None:
    loader = DataLoader(TensorDataset(X, LENGTHS, LABELS), **options)
    report = normswap.finetune(network(Sequences), loader, batch_size=4, steps=1, device="cpu", progress=False)
    found = [each for each in report.notes if "DataLoader" in each]
    if note is None:
        assert found == []
    else:
        (only,) = found
        assert re.search(note, only)


def test_worker_processes_make_batches_of_any_form() -> None:
    net = network(Sequences)
    assert pickle.loads(pickle.dumps(Forward.of(net))) == Forward.of(net)
    loader = DataLoader(Uneven(), 6, collate_fn=Uneven.padded)
    options: dict[str, Any] = {"batch_size": 4, "steps": 2, "device": "cpu", "progress": False}
    alone, helped = copy.deepcopy(net), copy.deepcopy(net)
    normswap.finetune(alone, loader, workers=0, **options)
    normswap.finetune(helped, loader, workers=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), helped.parameters(), strict=True))


def test_a_graph_is_measured_whole() -> None:
    nodes, edges = torch.randn(9, 4), torch.randint(0, 9, (2, 20))
    given = given_batches([((nodes, edges), torch.arange(9) % 3)], None)
    assert given is not None
    ((content, count),) = [(batch.content, batch.count) for batch in loaded(given, 4)]
    assert (count, len(content[0][0]), len(content[1])) == (9, 9, 9)


UNEVEN = [(X[:4], LENGTHS[:4], LABELS[:4]), (X[4:8, :, :6], LENGTHS[4:8].clamp(max=6), LABELS[4:8])]


@pytest.mark.parametrize(
    ("command", "kind", "data", "text"),
    [
        ("finetune", Sequences, UNEVEN, r"differ in size: samples of \(4, 8\), \(\) and of \(4, 6\), \(\)"),
        ("finetune", TakesDicts, FORMS[NOT_DRAWN_ANEW][1], "do not come apart"),
        ("finetune", Sequences, DataLoader(batches(), batch_size=None), "data set holds batches"),
        ("finetune", Needs, (X, LABELS), r"no labels|cannot run on the data \(TypeError"),
        ("evaluate", Needs, (X, LABELS), r"cannot run on the data \(TypeError"),
        ("evaluate", Sequences, DataLoader(TensorDataset(X), 4), r"no labels \(N,\)"),
        ("evaluate", Sequences, DataLoader(TensorDataset(X, LENGTHS, X.mean((1, 2))), 4), r"no labels \(N,\)"),
        ("evaluate", Sequences, [{"x": X, "lengths": LENGTHS, "labels": LABELS - 1}], "there is a label -1"),
        ("finetune", Sequences, [(x, torch.tensor(4), "text") for x in X], r"no labels \(N,\)"),
        ("finetune", Sequences, [(X[i, :, : i % 3 + 2], 3, 1) for i in range(6)], "cannot form a batch"),
    ],
)
def test_what_cannot_work_is_told_with_the_way_out(command: str, kind: type[nn.Module], data: Any, text: str) -> None:
    more: dict[str, Any] = {"progress": False} if command == "finetune" else {}
    with pytest.raises(normswap.NormswapError, match=text) as error:
        getattr(normswap, command)(network(kind), data, device="cpu", **more)
    assert error.value.hint


def test_sequences_of_unequal_length_are_told_of_padding_and_not_of_sizes_of_images() -> None:
    data = [(X[i, :, : i % 3 + 2], int(LABELS[i])) for i in range(COUNT)]
    net = network(Sequences)
    made = normswap.convert(net, "gn", groups=2, check=False)

    class Pairs(Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Any:
            return data[index]

    for call in (
        lambda: normswap.calibrate(made, reference=net, data=Pairs()),
        lambda: normswap.evaluate(net, Pairs()),
    ):
        with pytest.raises(DataError, match=r"samples .*cannot form a batch") as error:
            call()
        assert "A DataLoader whose collate_fn pads them" in str(error.value.hint)
        assert "size=224" not in str(error.value)


def test_a_network_that_gives_scores_of_each_step_is_told_of_loops_of_its_own() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    for command in (normswap.evaluate, normswap.finetune):
        with pytest.raises(normswap.NormswapError, match=r"shape \(\d+, 3, 8\); a classifier gives") as error:
            command(Steps(), (X, LABELS), device="cpu")
        assert "normswap.stabilized(model)" in error.value.hint


def shortened(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose sequences end at random."""
    batch = default_collate(items)
    return {**batch, "lengths": (batch["lengths"] - torch.randint(3, (len(items),))).clamp_min(1)}


@pytest.mark.parametrize("data", [Dicts(), DataLoader(Dicts(), collate_fn=shortened)], ids=["samples", "batches"])
def test_a_run_on_dicts_goes_on_where_it_stopped_whatever_its_collate_fn_draws(data: Any, tmp_path: Path) -> None:
    whole = network(Sequences)
    parts, again = copy.deepcopy(whole), copy.deepcopy(whole)
    same: dict[str, Any] = {"batch_size": 4, "lr": 0.01, "device": "cpu", "progress": False}
    normswap.finetune(whole, data, Dicts(), steps=9, output=tmp_path / "whole", **same)

    def stop(p: Any) -> None:
        if p.step >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        normswap.finetune(
            parts,
            data,
            Dicts(),
            steps=9,
            output=tmp_path / "parts",
            checkpoint_every=1,
            **{**same, "progress": stop},
        )
    normswap.finetune(again, data, Dicts(), steps=9, output=tmp_path / "parts", resume=True, **same)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def none_left(items: list[Any]) -> None:
    return None


def no_rows(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    return X[:0], LENGTHS[:0], LABELS[:0]


@pytest.mark.parametrize("collate", [none_left, no_rows])
def test_a_collate_fn_that_leaves_out_all_samples_of_a_batch_is_named(collate: Any) -> None:
    loader = DataLoader(Uneven(), collate_fn=collate)
    with pytest.raises(DataError, match="collate_fn left none of the"):
        normswap.finetune(network(Sequences), loader, batch_size=3, steps=1, device="cpu", progress=False)


class Batched(IterableDataset[Any]):
    """Whole batches, the last of them smaller."""

    def __iter__(self) -> Any:
        return iter(batches(7))


def test_a_stream_without_a_length_is_measured_in_batches_of_the_size_asked_for() -> None:
    net = network(Sequences)
    right = int((scores(net).argmax(1) == LABELS).sum())
    sizes: list[int] = []
    net.head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    for data, expected in ((DataLoader(Streamed(), batch_size=10), [10, 10, 4]), (Streamed(), [9, 9, 6])):
        sizes.clear()
        report = normswap.evaluate(net, data, batch_size=9)
        assert (report.images, round(report.figures["accuracy"] * COUNT)) == (COUNT, right)
        assert sizes == expected


def test_a_data_set_of_whole_batches_is_told_and_taken_without_a_batch_size() -> None:
    net = network(Sequences)
    made = normswap.convert(net, "gn", groups=2, check=False)
    for call in (
        lambda data: normswap.evaluate(net, data),
        lambda data: normswap.calibrate(made, net, data, method="moments", progress=False),
    ):
        with pytest.raises(DataError, match=r"cannot form a batch.*7") as error:
            call(Batched())
        assert "batch_size=None" in str(error.value.hint)
        call(DataLoader(Batched(), batch_size=None))
