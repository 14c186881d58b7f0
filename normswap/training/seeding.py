"""All that is random in a step depends on the run's seed and the step alone."""

from __future__ import annotations

import torch


def seed_step(seed: int, step: int) -> None:
    """Seed torch's random state for one step: all that is random in it depends on nothing that went before."""
    value = (seed * 0x9E3779B1 + step * 0x85EBCA77 + 1) % 2**63
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would note a traceback at every call for a CUDA that is not in use yet.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
