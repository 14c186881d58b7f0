"""The demo's figures as a picture, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .story import Story

GREY, ORANGE, BLUE = "#8a8f98", "#d9772b", "#2b6cb0"
FORMATS = (".png", ".svg", ".pdf")
_NAMES = {"bn": "BatchNorm", "gn": "GroupNorm"}


def draw(story: Story, path: Path) -> None:
    """Write the picture: accuracies by method on the left, fine-tuning on the right.

    The end of the name, one of `FORMATS`, says as what. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 5.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle("A network trained on handwritten digits, from BatchNorm to GroupNorm", fontsize=14)
    _bars(left, story)
    _curves(right, story)
    figure.savefig(path, format=path.suffix[1:].lower())


def _bars(axes: Any, story: Story) -> None:
    names = [method.name.replace(", ", ",\n") for method in story.methods]
    values = [100 * method.accuracy for method in story.methods]
    colours = [ORANGE, GREY] + [BLUE] * (len(names) - 2)
    bars = axes.barh(names, values, color=colours, height=0.62)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"accuracy on {story.held_out_images} held-out digits (%)")
    axes.set_title(f"Converted to GroupNorm, {story.groups} groups", loc="left", fontweight="bold")


def _curves(axes: Any, story: Story) -> None:
    for curve in story.curves:
        mixed = curve.batches == "mixed"
        axes.plot(
            curve.steps,
            [100 * value for value in curve.accuracy],
            color=ORANGE if curve.norm == "bn" else BLUE,
            linestyle="-" if mixed else (0, (4, 2)),
            linewidth=2,
            marker="o" if mixed else "s",
            markersize=4,
            label=f"{_NAMES[curve.norm]}, {'any two digits' if mixed else 'two of one digit'} in a batch",
        )
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.set_xlabel("training steps of 2 images")
    axes.set_ylabel("accuracy on held-out inverted digits (%)")
    axes.set_title("Fine-tuned on inverted digits at batch size 2", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9)
