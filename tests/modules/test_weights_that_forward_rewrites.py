"""Embeddings with `max_norm` rewrite their weights in forward: no run of normswap's may leave that behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fingerprint, randomized
from torch import Tensor, nn

import normswap
from normswap.inspection.example_inputs import guess_inputs
from normswap.modules.restore import undisturbed

WORDS = torch.randint(0, 12, (6, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


class Net(nn.Module):
    def __init__(self, bag: bool) -> None:
        super().__init__()
        kind: Any = nn.EmbeddingBag if bag else nn.Embedding
        self.words = kind(12, 4, max_norm=0.5)
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        x = x if x.dim() == 2 else x.mean(1)
        return self.head(torch.relu(self.norm(self.first(x))))


@pytest.fixture(params=[False, True], ids=["Embedding", "EmbeddingBag"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    made = randomized(Net(request.param)).eval()
    with torch.no_grad():
        made.words.weight.copy_(torch.randn(12, 4) * 3)
    return made


def changes(net: nn.Module) -> bool:
    before = net.words.weight.clone()
    with torch.no_grad():
        net(WORDS)
    return not torch.equal(before, net.words.weight)


def test_a_plain_run_does_rewrite_them(net: nn.Module) -> None:
    assert changes(net)


RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "guess": guess_inputs,
    "inspect": normswap.inspect,
    "inspect on inputs": lambda net: normswap.inspect(net, WORDS),
    "plan": lambda net: normswap.plan(net, "gn", groups=2, example_inputs=WORDS),
    "advise": lambda net: normswap.advise(net, data=[WORDS], example_inputs=WORDS),
    "convert": lambda net: normswap.convert(net, "gn", groups=2, example_inputs=WORDS),
    "convert without inputs": lambda net: normswap.convert(net, "gn", groups=2),
    "verify": lambda net: normswap.verify(net, net, [WORDS]),
    "verify on random inputs": lambda net: normswap.verify(net, net),
    "evaluate": lambda net: normswap.evaluate(net, [{"x": WORDS, "labels": LABELS}]),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_run_leaves_a_trace(net: nn.Module, name: str) -> None:
    before = fingerprint(net)
    if isinstance(net.words, nn.EmbeddingBag) and name in ("convert without inputs", "verify on random inputs"):
        pytest.skip("no input is guessed for a bag of words")
    RUNS[name](net)
    assert fingerprint(net) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_converted_has_the_weights_as_they_were_and_goes_back_to_them(net: nn.Module, inplace: bool) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = normswap.convert(net, "gn", groups=2, example_inputs=WORDS, inplace=inplace)
    assert torch.equal(made.words.weight, before["words.weight"])
    back = normswap.revert(made).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["moments", "balance", "refit"])
def test_repairing_changes_neither_them_nor_the_original(net: nn.Module, method: Any) -> None:
    made = normswap.convert(net, "gn", groups=2, example_inputs=WORDS)
    before, words = fingerprint(net), made.words.weight.clone()
    normswap.calibrate(made, net, [WORDS], method=method, progress=False)
    assert torch.equal(made.words.weight, words)
    normswap.distil(made, net, [WORDS], steps=2, train="norm", progress=False)
    assert fingerprint(net) == before


class Limited(nn.Conv1d):
    """A convolution whose forward keeps its weights small, as those of networks for EEG do."""

    max_norm = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=self.max_norm)
        return super().forward(x)


class OtherwiseNamed(nn.Conv1d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._max_norm_val = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=self._max_norm_val)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Limited, OtherwiseNamed])
def test_weights_that_forward_puts_in_anew_are_those_of_before(kind: type[nn.Module]) -> None:
    net = nn.Sequential(kind(3, 4, 1), nn.Flatten())
    weight = net[0].weight
    before, place = weight.clone(), weight.data_ptr()
    for _ in range(2):
        with undisturbed(net), torch.no_grad():
            net(torch.randn(2, 3, 5))
            assert not torch.equal(weight, before)
        assert torch.equal(weight, before)
        assert weight.data_ptr() == place


def test_other_weights_are_not_copied_for_a_run() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    with undisturbed(net), torch.no_grad():
        net[0].weight.add_(1)
        net[1].weight.add_(1)
        held = [w.clone() for w in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(held, net.parameters(), strict=True))
