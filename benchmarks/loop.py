"""What the loop of `finetune` costs over one written by hand: microseconds a step, and images a second.

    python benchmarks/loop.py [--runs 5] [--steps 600]

Both train the same network on the same tensors with AdamW, a cosine and clipped gradients; the time of a step is that
of a long run less that of a short one, so that what happens once does not count. They take turns; the best of
the runs, in CPU time of one thread, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import normswap

SHORT = 20


def by_hand(model: nn.Module, data: tuple[Tensor, Tensor], batch_size: int, steps: int) -> None:
    x, y = data
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    model.train()
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(x)).tolist()
        chosen, order = torch.tensor(order[:batch_size]), order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        if not math.isfinite(float(loss.detach())):
            raise ValueError("the loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_normswap(model: nn.Module, data: tuple[Tensor, Tensor], batch_size: int, steps: int) -> None:
    normswap.finetune(model, data, batch_size=batch_size, steps=steps, lr=1e-4, device="cpu", warmup=0.0)


def seconds(train: Callable[..., None], model: nn.Module, *more: object) -> float:
    start = time.process_time()
    train(model, *more)
    return time.process_time() - start


def compare(
    build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], batch_size: int, steps: int, runs: int
) -> tuple[float, float]:
    """Seconds of a step, by hand and by normswap."""
    best: dict[tuple[int, int], float] = {}
    for _ in range(runs + 1):  # the first imports what is needed
        for i, train in enumerate((by_hand, by_normswap)):
            for count in (SHORT, SHORT + steps):
                took = seconds(train, build(), data, batch_size, count)
                best[i, count] = min(best.get((i, count), math.inf), took)
    hand, ours = ((best[i, SHORT + steps] - best[i, SHORT]) / steps for i in range(2))
    return hand, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = torch.randn(512, 32), torch.randint(10, (512,))
    hand, ours = compare(lambda: nn.Linear(32, 10), tiny, 8, options.steps, options.runs)
    print(f"linear 32-10, batch 8: by hand {hand * 1e6:.0f} us a step, finetune {ours * 1e6:.0f}: "
          f"{(ours - hand) * 1e6:+.0f} us", flush=True)  # fmt: skip
    steps = max(10, options.steps // 20)
    images = torch.randn(8 * (SHORT + steps), 3, 64, 64), torch.randint(10, (8 * (SHORT + steps),))
    build = lambda: normswap.convert(resnet18(weights=None, num_classes=10), "gn", groups=32)  # noqa: E731
    hand, ours = compare(build, images, 8, steps, options.runs)
    print(f"resnet18 with gn, 64x64, batch 8: by hand {8 / hand:.1f} images/s, finetune {8 / ours:.1f}: "
          f"{hand / ours:.3f} times", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
