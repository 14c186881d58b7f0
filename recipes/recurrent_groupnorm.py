"""Swap the BatchNorm layers between two GRU layers for GroupNorm, on sentences of different lengths.

Goal:      find the spaces in text without any; train with BatchNorm, convert, calibrate, go on at batch size 2
Command:   python recipes/recurrent_groupnorm.py [--to gn|ln|ln-channel --groups 4]
Time:      about 60 s on one CPU core
Expected:  F1 of the spaces in Python's own documentation, 0.907 with BatchNorm: 0.508 with gamma and beta copied, 0.899
           converted, 0.907 calibrated; trained on at batch size 2, BatchNorm 0.931 and GroupNorm 0.933
"""

import argparse
import copy
import re
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import normswap

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--to", choices=("gn", "ln", "ln-channel"), default="gn")
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)

# Sentences from the documentation that comes with Python; their letters, and after which of them there was a space.
text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
sentences = [s.lower() for s in re.findall(r"[A-Z][a-zA-Z ,]{25,140}\.", text)][: 70 if options.tiny else 4000]


def sample(sentence: str) -> tuple[Tensor, Tensor]:
    letters = [letter for letter in sentence if letter != " "]
    ends = {len(sentence[: m.start()].replace(" ", "")) - 1 for m in re.finditer(" ", sentence)}
    return torch.tensor([ord(x) for x in letters]), torch.tensor([float(i in ends) for i in range(len(letters))])


samples = [sample(sentence) for sentence in dict.fromkeys(sentences)]
held_out, training = samples[::5], [s for i, s in enumerate(samples) if i % 5]


class Speller(nn.Module):
    """Letters `(N, T)` and lengths `(N,)` -> a score `(N, T)` for a space after each letter."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.layers = nn.ModuleList([nn.GRU(n, width, batch_first=True, bidirectional=True) for n in (32, 2 * width)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(2 * width) for _ in self.layers])
        self.head = nn.Linear(2 * width, 1)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(letters)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            packed, _ = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            x, _ = pad_packed_sequence(packed, batch_first=True)
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x).squeeze(-1)


def batches(of: list, size: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """((letters, lengths), spaces), padded with zeros."""
    for start in range(0, len(of) - size + 1, size):
        letters, spaces = zip(*of[start : start + size], strict=True)
        lengths = torch.tensor([len(x) for x in letters])
        yield (pad_sequence(letters, batch_first=True), lengths), pad_sequence(spaces, batch_first=True)


def train(model: nn.Module, size: int, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(training)).tolist()
        for inputs, spaces in batches([training[i] for i in order[: 20 if options.tiny else None]], size):
            mask = torch.arange(spaces.shape[1]) < inputs[1][:, None]
            loss = F.binary_cross_entropy_with_logits(model(*inputs)[mask], spaces[mask])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()


@torch.no_grad()
def f1(model: nn.Module) -> float:
    """Of the spaces in held-out sentences."""
    right = found = wanted = 0
    for inputs, spaces in batches(held_out, 20):
        mask = torch.arange(spaces.shape[1]) < inputs[1][:, None]
        said, true = model(*inputs)[mask] > 0, spaces[mask] > 0
        right, found, wanted = right + int((said & true).sum()), found + int(said.sum()), wanted + int(true.sum())
    return 2 * right / max(found + wanted, 1)


bn = Speller()
train(bn, size=20, epochs=1 if options.tiny else 4, lr=4e-3)
print(f"{len(training)} sentences to train on, {len(held_out)} held out")
print(f"BatchNorm                     F1 {f1(bn):.4f}")

# --- The part to copy begins here. ---
# Lengths differ: the new norm leaves padded steps out, as it reads what `pad_packed_sequence` gave.
example, _ = next(batches(held_out, 4))
groups = {"groups": options.groups} if options.to == "gn" else {}
copied = normswap.convert(bn, options.to, transfer="copy", example_inputs=example, **groups)
print(f"gamma and beta copied         F1 {f1(copied):.4f}")
new = normswap.convert(bn, options.to, example_inputs=example, **groups)
print(f"converted                     F1 {f1(new):.4f}")
normswap.calibrate(new, reference=bn, data=list(batches(training[:400], 20)))
print(f"calibrated                    F1 {f1(new):.4f}")
with torch.no_grad():
    letters, lengths = example
    alone = torch.cat([new(x[None, :n], n[None])[0] for x, n in zip(letters, lengths, strict=True)])
    mask = torch.arange(letters.shape[1]) < lengths[:, None]
    print(f"a sentence alone against the same in a padded batch: {(new(*example)[mask] - alone).abs().max():.0e} apart")

for name, model in (("BatchNorm", copy.deepcopy(bn)), (options.to, new)):
    torch.manual_seed(1)
    train(model, size=2, epochs=1, lr=5e-4)
    # --- The part to copy ends here. ---
    print(f"trained on at batch size 2:   F1 {f1(model):.4f} ({name})")
