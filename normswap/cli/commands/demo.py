"""`normswap demo`: the whole story on real digits, in under a minute on a CPU, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import OutputError
from ..arguments import options
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting

if TYPE_CHECKING:
    from ...demo.story import Story
    from ..terminal.render import Page

_NORMS = {"bn": "BatchNorm", "gn": "GroupNorm"}
_BATCHES = {"mixed": "any two digits", "same digit": "two of one digit"}


def demo(
    ctx: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the picture goes: .png, .svg or .pdf.")
    ] = Path("normswap-demo.png"),
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if it exists.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn: images to calibrate on, batches to train on.")] = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a small network trained on handwritten digits, and measure what each step keeps of its accuracy.

    Then fine-tune it at batch size 2, with BatchNorm and with GroupNorm. Needs no network and no GPU, and takes under
    a minute; every figure is computed anew, on digits that no step has seen. The picture needs matplotlib, which the
    extra `plot` brings.
    """
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        from ...demo import story as demo_story
        from ...demo.picture import FORMATS
        from ...files.writing import check_writable

        if output.suffix.lower() not in FORMATS and not output.is_dir():
            raise OutputError(
                f"{output} is not a name for a picture", hint=f"It ends in {' or '.join(FORMATS)}, which says as what."
            )
        check_writable(output, overwrite=force)
        story = demo_story.tell(seed, say=out.step)
        picture = output if _drawn(story, output, out) else None
        if picture is not None:
            ctx.meta[WRITTEN] = picture
        values = story.to_dict() | {"picture": None if picture is None else str(picture)}
        out.show(lambda: values, lambda page: _render(page, story, picture))


def _drawn(story: Story, output: Path, out: Output) -> bool:
    """Whether there is a picture; without matplotlib there is none, and that is said."""
    from ...demo.picture import draw
    from ...files.writing import atomic

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        out.note("matplotlib is not installed, so no picture was drawn; pip install 'normswap[plot]' brings it")
        return False
    with atomic(output) as temporary:
        draw(story, temporary)
    return True


def _render(page: Page, story: Story, picture: Path | None) -> None:
    page.line(
        ("A residual network with BatchNorm, converted to GroupNorm", "strong"),
        f" ({story.groups} groups); accuracy on {story.held_out_images} held-out handwritten digits",
    )
    page.table(
        ("network", ">accuracy", ">images without labels"),
        [(m.name, _percent(m.accuracy), str(m.images or "-")) for m in story.methods],
    )
    page.gap()
    steps = story.curves[0].steps[-1]
    page.line(
        ("Fine-tuned on inverted digits at batch size 2", "strong"),
        f", {steps} steps: same images, same learning rate; accuracy on held-out inverted digits",
    )
    page.table(
        ("norm", "a batch holds", ">before", ">after"),
        [
            (_NORMS[c.norm], _BATCHES[c.batches], _percent(c.accuracy[0]), _percent(c.accuracy[-1]))
            for c in story.curves
        ],
    )
    if picture is not None:
        page.gap()
        page.line(("Picture: ", "strong"), (str(picture), "path"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
