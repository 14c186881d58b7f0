"""What wrote the files of this folder, when the modules of normswap lay side by side; kept to describe them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import torch
from nets import residual

import normswap

x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
y = torch.arange(24) % 3
original = residual()
found = {"original": original(x[:4]).detach()}


def keep(name: str, model: torch.nn.Module) -> None:
    normswap.save(model, f"{name}.safetensors")
    found[name] = model.eval()(x[:4]).detach()


def groups(**options: object) -> torch.nn.Module:
    return normswap.convert(residual(), "gn", groups=2, example_inputs=x[:2], **options)


def stop(progress: object) -> None:
    if progress.step >= 7:
        os.kill(os.getpid(), signal.SIGINT)


def interrupt(progress: object) -> None:
    if progress.step == 4:
        raise KeyboardInterrupt


def main() -> None:
    keep("folded", groups())
    keep("soft", groups(eps="auto"))
    keep("without-undo", groups(undo=False))
    keep("frozen", normswap.convert(residual(), "frozen", example_inputs=x[:2]))
    keep("fused", normswap.convert(residual(), "fused", example_inputs=x[:2]))
    rules = {"bn3": "renorm", "bn2": "keep", "*": "ln"}
    keep("renorm", normswap.convert(residual(), rules=rules, example_inputs=x[:2]))
    keep("twice", normswap.convert(groups(), "in", sources=["gn"], example_inputs=x[:2]))
    for name, method in (("calibrated", "balance"), ("refitted", "refit")):
        model = groups()
        normswap.calibrate(model, original, x, method=method)
        keep(name, model)
    for name in ("interrupted", "distilled"):
        model = groups()
        normswap.calibrate(model, original, x)
        if name == "distilled":
            normswap.distil(model, original, x, steps=6, batch_size=8)
            keep(name, model)
            continue
        with suppress(KeyboardInterrupt):
            normswap.distil(model, original, x, steps=6, batch_size=8, checkpoint="distil.state", progress=interrupt)
    with suppress(KeyboardInterrupt):
        normswap.finetune(groups(), (x, y), (x, y), output="cut", batch_size=4, epochs=2, lr=0.01, progress=stop)
    model, labels = groups(), torch.arange(24) % 5
    options = {"output": "head", "num_classes": 5, "batch_size": 4, "steps": 6, "lr": 0.01}
    normswap.finetune(model, (x, labels), (x, labels), **options)
    found["head/last"] = model.eval()(x[:4]).detach()
    Path("plan.json").write_text(normswap.plan(residual(), "gn", groups=2, example_inputs=x[:2]).to_json())
    torch.save(found, "outputs.pt")


if __name__ == "__main__":
    main()
