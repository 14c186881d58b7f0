"""The figures of the demo, each computed when it is asked for, with the public API."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from .digits import Digits, split
from .network import pretrained

GROUPS = 4
CALIBRATION_IMAGES = 256
LR = 3e-4
"""Of AdamW. Folding leaves smaller weights, which one rate moves further: at 1e-3 the network with batch norms learns
faster from mixed batches than the converted one (and still fails on batches of one digit)."""
MEASUREMENTS = 12


@dataclass(frozen=True)
class Method:
    """One way to get a GroupNorm network, and the accuracy that it leaves on the held-out digits.

    images: how many images without labels it took.
    """

    name: str
    accuracy: float
    images: int = 0


@dataclass(frozen=True)
class Curve:
    """One fine-tuning run at batch size 2: the accuracy after so many steps, on held-out digits of the new kind.

    norm: "bn" or "gn". batches: "mixed" if the two images of a batch are any, "same digit" if they show the same one.
    """

    norm: str
    batches: str
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Story:
    """All figures. methods: the original first, then from the simplest to the best."""

    seed: int
    groups: int
    training_images: int
    held_out_images: int
    methods: tuple[Method, ...]
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def tell(
    seed: int = 0,
    *,
    distil_steps: int = 150,
    finetune_steps: int = 240,
    say: Callable[[str], None] = lambda _: None,
) -> Story:
    """Compute the figures; about half a minute on a CPU core. say: called with what is being done."""
    with _one_thread():
        return _told(seed, distil_steps, finetune_steps, say)


def _told(seed: int, distil_steps: int, finetune_steps: int, say: Callable[[str], None]) -> Story:
    training, held_out = split()
    original = pretrained()
    methods, converted = _methods(original, training, held_out, seed, distil_steps, say)
    new, new_held_out = inverted(training), inverted(held_out)
    curves = []
    for batches in ("mixed", "same digit"):
        chosen = _batches(new.labels, finetune_steps, same_digit=batches == "same digit", seed=seed)
        for norm, start in (("bn", original), ("gn", converted)):
            say(f"fine-tuning {norm} at batch size 2, {batches}")
            steps, values = _finetuned(start, new, chosen, new_held_out)
            curves.append(Curve(norm, batches, steps, values))
    return Story(seed, GROUPS, len(training), len(held_out), methods, tuple(curves))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of 8x8 images gain little from more threads, which on a busy machine wait for each other for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(network: nn.Module, digits: Digits) -> float:
    """The share of the digits that the network, in eval mode, takes for what they are."""
    network.eval()
    with torch.no_grad():
        return float((network(digits.images).argmax(1) == digits.labels).float().mean())


def inverted(digits: Digits) -> Digits:
    """White on black becomes black on white, which the network has never seen."""
    return Digits(1 - digits.images, digits.labels)


def _methods(
    original: nn.Module, training: Digits, held_out: Digits, seed: int, steps: int, say: Callable[[str], None]
) -> tuple[tuple[Method, ...], nn.Module]:
    """The accuracies, and the best of the converted networks."""
    say("converting")
    found = [Method("BatchNorm, the original", accuracy(original, held_out))]
    copied = normswap.convert(original, to="gn", groups=GROUPS, transfer="copy")
    found.append(Method("γ and β copied", accuracy(copied, held_out)))
    model = normswap.convert(original, to="gn", groups=GROUPS)
    found.append(Method("folded", accuracy(model, held_out)))
    say("calibrating")
    some = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
    normswap.calibrate(model, original, training.images[some])
    found.append(Method("+ calibrated", accuracy(model, held_out), len(some)))
    say(f"distilling for {steps} steps")
    normswap.distil(model, original, training.images, steps=steps, seed=seed, augment="none")  # digits have no mirror
    found.append(Method("+ distilled", accuracy(model, held_out), len(training)))
    return tuple(found), model


def _batches(labels: Tensor, steps: int, *, same_digit: bool, seed: int) -> list[Tensor]:
    """Indices of the two images of each step, the same for every network."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(len(labels))
    chosen = []
    for _ in range(steps):
        digit = torch.randint(10, (), generator=generator)
        among = every[labels == digit] if same_digit else every
        chosen.append(among[torch.randint(len(among), (2,), generator=generator)])
    return chosen


def _finetuned(
    start: nn.Module, digits: Digits, batches: list[Tensor], held_out: Digits
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Steps and accuracies of training a copy of the network, with the usual loop."""
    network = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    every = max(1, len(batches) // MEASUREMENTS)
    found = [(0, accuracy(network, held_out))]
    for step, chosen in enumerate(batches, start=1):
        network.train()
        loss = F.cross_entropy(network(digits.images[chosen]), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == len(batches):
            found.append((step, accuracy(network, held_out)))
    return tuple(step for step, _ in found), tuple(value for _, value in found)
