"""What the tests of fine-tuning on the real digits network share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.finetuning.settings import Settings

SMALL = {"batch_size": 2, "steps": 10, "device": "cpu"}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(step: int, number: int = signal.SIGINT) -> Any:
    """Progress that presses Ctrl-C after a step."""

    def progress(p: Any) -> None:
        if p.step >= step and not p.validation:
            signal.raise_signal(number)

    return progress


def settings(**more: Any) -> Settings:
    fixed: dict[str, Any] = {"batch_size": 2, "accumulate": 1, "processes": 1, "samples": 40, "optimizer": "adamw"}
    fixed |= {"weight_decay": 0.0, "clip_grad": None, "train": "all", "distil": 0.0, "ema": 0.0, "seed": 0}
    return Settings(**fixed, label_smoothing=0.0, precision="fp32", stabilize=True, network="", **more)
