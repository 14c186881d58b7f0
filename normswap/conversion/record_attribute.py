"""Where a converted network keeps the record of its conversion, so that copies of it have it too."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

ATTRIBUTE = "_normswap"
_PRESERVED = "_user_preserved_attributes"  # what torch.fx hands on to the copy of a traced network


def put_record(root: nn.Module, record: Any) -> None:
    """Keep `record` on the root of a network; None takes away what is there."""
    tables = [root.__dict__]
    if isinstance(root, fx.GraphModule):
        tables.append(root.meta.setdefault(_PRESERVED, {}))
    for table in tables:
        if record is None:
            table.pop(ATTRIBUTE, None)
        else:
            table[ATTRIBUTE] = record
