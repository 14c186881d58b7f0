"""Options of `normswap finetune` alone: random changes, when a run ends, what it tells to whom."""

from __future__ import annotations

from typing import Annotated

import typer

from ...choices import MONITORS, TRACKERS
from . import options

Mixup = Annotated[
    float | None,
    typer.Option(min=0, metavar="ALPHA", help="Mix the images of a batch, such as 0.2.", show_default=False),
]
Cutmix = Annotated[
    float | None,
    typer.Option(min=0, metavar="ALPHA", help="Paste parts of others into images, such as 1.", show_default=False),
]
RandAugment = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="[N]", help="N more random changes of each image; 2 without a number.", show_default=False
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="End after N validations without a better figure.", show_default="never"),
]
Monitor = Annotated[
    str | None,
    typer.Option(
        metavar="FIGURE",
        help="The validation figure that tells the best network, such as loss.",
        show_default="accuracy, map or miou",
        autocompletion=options.completing(*dict.fromkeys(name for names in MONITORS.values() for name in names)),
    ),
]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        metavar="N|'N minutes'",
        help="Write the state every N steps, or minutes or hours, too.",
        show_default="after each epoch",
    ),
]


def _trackers(ctx: typer.Context, param: typer.CallbackParam, names: list[str] | None) -> list[str]:
    """Those of --track, each once."""
    return [options.choice(ctx, "--track", name, TRACKERS) for name in dict.fromkeys(names or ())]


Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="|".join(TRACKERS),
        help="Send the figures there too; repeatable.",
        autocompletion=options.completing(*TRACKERS),
        callback=_trackers,
        show_default=False,
    ),
]
