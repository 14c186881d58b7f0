"""The charts of the pages that `--report` writes: what their axes say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from normswap.pages.charts import Series, line_chart
from normswap.pages.content import _curves


def axis(svg: str, kind: str) -> list[float]:
    """The numbers along an axis: "middle" for x, "end" for y."""
    found = re.findall(rf'class="axis {kind}"[^>]*>([^<]*)<', svg)
    return [float(text) for text in found if re.fullmatch(r"[-+.e\d]+", text)]


@pytest.mark.parametrize("last", [1, 2, 3, 7, 40])
def test_epochs_that_are_whole_are_counted_in_whole_ones(last: int) -> None:
    svg = line_chart([Series("a", [(n, 0.5) for n in range(last + 1)])], x="epoch", y="loss")
    ticks = axis(svg, "middle")
    assert len(ticks) > 1
    assert all(tick == int(tick) for tick in ticks)
    parts = line_chart([Series("a", [(n / 4, 0.5) for n in range(5)])], x="epoch", y="loss")
    assert any(tick != int(tick) for tick in axis(parts, "middle"))


@pytest.mark.parametrize("values", [(0, 0, 0), (0, 0.001, 1), (0.2, 0.2, 0.2)])
def test_figures_from_zero_have_no_axis_below_it(values: tuple[float, ...]) -> None:
    ticks = axis(line_chart([Series("a", list(enumerate(values)))], x="epoch", y="mAP"), "end")
    assert min(ticks) >= 0
    assert min(axis(line_chart([Series("a", [(0, -1), (1, 1)])], x="epoch", y="score"), "end")) < 0


@pytest.mark.parametrize("most", [0.1, 0.5, 0.95, 1.0, 2.0, 7.3])
def test_the_name_of_the_axis_stands_clear_of_its_highest_number(most: float) -> None:
    svg = line_chart([Series("a", [(0, 0), (1, most)])], x="epoch", y="mAP50")
    title = float(re.findall(r'y="([\d.]+)">mAP50<', svg)[0])
    numbers = [float(y) for y in re.findall(r'class="axis end" x="46.0" y="([\d.]+)"', svg)]
    assert min(numbers) - title > 12  # more than a line


def test_figures_of_detection_are_called_what_the_field_calls_them(tmp_path: Path) -> None:
    names = ("val_loss", "val_map", "val_map_50", "val_mask_map_75", "val_miou", "val_pixel_accuracy")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1, **dict.fromkeys(names, 0.5)}) + "\n")
    found = [chart.title for chart in _curves({"output": str(tmp_path), "best_name": "val_map"})]
    assert found == ["Loss", "mAP", "mAP50", "Mask mAP75", "mIoU", "Pixel accuracy"]
