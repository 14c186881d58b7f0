"""All that is random in a step depends on the run's seed and the step alone."""

from __future__ import annotations

import torch


def mixed_seed(seed: int, *numbers: int, plus: int = 1) -> int:
    """A seed of torch for what a run draws under these numbers, such as an epoch and an index: 0 <= seed < 2^63.

    plus: tells streams of the same numbers apart.
    """
    factors = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
    return (sum(f * n for f, n in zip(factors, (seed, *numbers), strict=False)) + plus) % 2**63


def seed_step(seed: int, step: int) -> None:
    """Seed torch's random state for one step: all that is random in it depends on nothing that went before."""
    value = mixed_seed(seed, step)
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would note a traceback at every call for a CUDA that is not in use yet.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
