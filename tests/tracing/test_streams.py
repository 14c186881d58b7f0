"""Residual streams: what writes them, who reads them, and the reasons why they cannot be centred."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.tracing.readers import readers_of
from normswap.tracing.stream import Run, Stream
from normswap.tracing.stream_moves import Offence, Share

C = 6


class Block(nn.Module):
    """`x + W2 f(W1 LN(x))`."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 8), nn.Linear(8, C)
        self.scale = nn.Parameter(torch.rand(C) + 0.5) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale


class Net(nn.Module):
    """Patches, positions, a class token, blocks, a last norm and a head; `change` says what happens between blocks."""

    def __init__(self, change: Any = None, scale: bool = False, last: Any = None) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, C, 2, 2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, 5, C))
        self.blocks = nn.ModuleList([Block(scale), Block()])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 2)
        self.change, self.last = change, last
        self.other = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = self.blocks[0](x)
        x = x if self.change is None else self.change(self, x)
        x = self.blocks[1](x)
        return self.head(self.norm(x)[:, 0]) if self.last is None else self.last(self, x)


NUMBERS = torch.arange(C)
IMAGE = torch.randn(2, 3, 4, 4)
WRITERS = {
    "patch.weight": Share(0), "patch.bias": Share(0), "token": Share(2), "position": Share(2),
    "blocks.0.down.weight": Share(0), "blocks.0.down.bias": Share(0),
    "blocks.1.down.weight": Share(0), "blocks.1.down.bias": Share(0),
}  # fmt: skip


def streams(net: nn.Module, *inputs: Tensor) -> dict[str, Stream]:
    run = Run(net.eval(), inputs or (IMAGE,))
    return {path: run.stream(path) for path in run.norms}


@pytest.mark.parametrize("norm", ["blocks.0.norm", "blocks.1.norm", "norm"])
def test_everything_that_writes_to_a_stream_is_found_from_each_of_its_norms(norm: str) -> None:
    found = streams(Net())[norm]
    assert found.problem == ""
    assert dict(found.writers) == WRITERS


def test_a_layer_scale_is_told_with_what_it_scales() -> None:
    found = streams(Net(scale=True))["norm"]
    assert found.writers["blocks.0.down.weight"] == Share(0, ("blocks.0.scale",))
    assert found.writers["blocks.0.down.bias"] == Share(0, ("blocks.0.scale",))
    assert found.writers["blocks.1.down.weight"] == Share(0)
    assert "blocks.0.scale" not in found.writers


FINE = {
    "dropped paths": lambda net, x: x * torch.rand(len(x), 1, 1),
    "a number": lambda net, x: x / 3,
    "a mean over tokens beside it": lambda net, x: x + x.mean(1, keepdim=True),
    "tokens put away and back": lambda net, x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1),
    "windows": lambda net, x: x.view(x.shape[0], 1, 5, C).permute(0, 2, 1, 3).reshape(x.shape[0], 5, C),
    "another linear layer": lambda net, x: x + net.other(net.blocks[1].norm(x)),
}


@pytest.mark.parametrize("what", FINE)
def test_what_treats_all_channels_alike_is_passed(what: str) -> None:
    found = streams(Net(FINE[what]))
    assert {stream.problem for stream in found.values()} == {""}
    assert WRITERS.keys() <= found["norm"].writers.keys()


REFUSED = {
    "an activation": (lambda net, x: torch.relu(x), "relu in (root)"),
    "a linear layer without a norm": (lambda net, x: x + net.other(x), "it is read by what is no linear layer or sum"),
    "a norm that writes": (lambda net, x: net.norm(x), "native_layer_norm in norm"),
    "one number for all channels": (lambda net, x: x + 1, "a number is added to all of its channels"),
    "one value for all channels": (lambda net, x: x + torch.ones(1, 5, 1), "one value is added to all"),
    "each channel by its own": (lambda net, x: x * torch.rand(2, 5, C), "multiplied by something of its own"),
    "scaled after it was written": (lambda net, x: x * net.position[0, 0], "by something of its own"),
    "a product of streams": (lambda net, x: x * x, "by something of its own"),
    "its inverse": (lambda net, x: 1 / x + x, "(reciprocal in (root))"),
    "the input": (lambda net, x: x + NUMBERS, "the network's input or a constant"),
    "channels taken apart": (lambda net, x: torch.cat([x[..., :3], x[..., 3:]], -1), "joined with others"),
    "channels next to each other": (lambda net, x: x.transpose(1, 2).reshape(2, 5, C) + x, ""),
    "a softmax": (lambda net, x: x.softmax(-1), "_softmax in (root)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_is_refused_with_its_name(what: str) -> None:
    change, reason = REFUSED[what]
    problem = streams(Net(change))["blocks.1.norm"].problem
    assert problem
    assert reason in problem


def test_a_stream_that_the_network_gives_away_is_refused() -> None:
    problem = streams(Net(last=lambda net, x: (net.head(net.norm(x)), x)))["norm"].problem
    assert "the network gives it, or keeps it, as it is" in problem


def test_a_stream_that_is_kept_on_a_module_is_refused() -> None:
    def keep(net: nn.Module, x: Tensor) -> Tensor:
        net.seen = x
        return x

    assert "keeps it" in streams(Net(keep))["norm"].problem


class Words(nn.Module):
    """Tied: the table of words is the head, too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.block, self.norm = nn.Embedding(9, C), Block(), nn.LayerNorm(C)
        self.head = nn.Linear(C, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.table(x))))


def test_a_table_of_words_is_a_writer_unless_it_is_the_head_too() -> None:
    words = torch.arange(5)[None]
    assert streams(Words(tied=False), words)["norm"].writers["table.weight"] == Share(1)
    problem = streams(Words(tied=True), words)["norm"].problem
    assert "table.weight writes to it, and elsewhere it is read by" in problem
    assert "head" in problem


def test_what_is_written_in_place_counts_as_what_it_becomes() -> None:
    def add(net: nn.Module, x: Tensor) -> Tensor:
        x += net.other(net.norm(x))
        return x

    assert "other.weight" in streams(Net(add))["norm"].writers


def test_what_is_written_over_while_another_reads_it_is_refused() -> None:
    def write(net: nn.Module, x: Tensor) -> Tensor:
        first = x[:, :1]
        x += net.other(net.norm(x))
        return x + first

    assert "written over" in streams(Net(write))["norm"].problem


def test_post_norm_layers_of_torch_are_refused_and_pre_norm_ones_accepted() -> None:
    for first in (True, False):
        layer = nn.TransformerEncoderLayer(C, 2, 8, batch_first=True, norm_first=first)
        net = nn.Sequential(nn.Linear(3, C), layer, layer, nn.LayerNorm(C), nn.Linear(C, 2))
        found = streams(net, torch.randn(2, 4, 3))
        assert all((stream.problem == "") == first for stream in found.values())


def test_the_readers_of_each_norm_are_found() -> None:
    run = Run(Net().eval(), (IMAGE,))
    readers = {path: [(r.weight, r.dim, r.bias) for r in readers_of(run, path)] for path in run.norms}
    assert readers == {
        "blocks.0.norm": [("blocks.0.up.weight", 1, "blocks.0.up.bias")],
        "blocks.1.norm": [("blocks.1.up.weight", 1, "blocks.1.up.bias")],
        "norm": [("head.weight", 1, "head.bias")],
    }


NO_READER = {
    "nothing but layers": (lambda net, x: net.norm(x), "the network gives it"),
    "an activation": (lambda net, x: net.head(torch.relu(net.norm(x))), "relu"),
    "a sum": (lambda net, x: net.head(net.norm(x) + 1), "add"),
    "another stream": (lambda net, x: net.head(net.norm(x)) + net.head(x.relu()), "reads other values, too"),
}


@pytest.mark.parametrize("what", NO_READER)
def test_where_others_read_it_or_them_gamma_cannot_go_into_readers(what: str) -> None:
    last, reason = NO_READER[what]
    with pytest.raises(Offence, match=reason):
        readers_of(Run(Net(last=last).eval(), (IMAGE,)), "norm")
