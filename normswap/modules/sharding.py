"""Networks whose parameters are shared out over processes by FSDP: `fully_shard`, and the wrapper of before."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError

_FLATTENS = "FullyShardedDataParallel"


def reshard(model: nn.Module) -> None:
    """Let every module that `fully_shard` was called on hold its own shards again, and nothing gathered.

    After a forward pass without a backward one the outermost module keeps its gathered parameters, and these are what
    its layers show as `weight`; what is changed there is lost at the next step, since the shards do not hear of it.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported, nothing can be sharded
    kind = getattr(fsdp, "FSDPModule", ())  # torch 2.6 has it
    for module in nn.Module.modules(model):
        if isinstance(module, kind):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, where it is sharded. Each of them must call this."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def check_not_flattened(model: nn.Module, what: str) -> None:
    """Raise OptionError for a network in the first FSDP, whose layers do not have weights of their own any more."""
    if any(type(m).__name__ == _FLATTENS and type(m).__module__.startswith("torch.") for m in nn.Module.modules(model)):
        raise OptionError(
            f"{what} needs the weights of each layer, and {_FLATTENS} has put them into flat pieces",
            hint="Shard with torch.distributed.fsdp.fully_shard (accelerate: fsdp_version=2) instead.",
        )
