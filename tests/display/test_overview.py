from __future__ import annotations

from torch import nn

import normswap
from normswap.planning.planner import plan


def deep(blocks: int = 40) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 1), nn.BatchNorm2d(4)) for i in range(blocks)]
    return nn.Sequential(*layers, nn.LayerNorm(4))


def test_the_repr_of_an_inventory_is_one_line_and_its_text_the_table_of_inspect() -> None:
    found = normswap.inspect(deep())
    assert repr(found) == "<Inventory: 41 norm layers (40 bn, 1 ln), 0 suspects>"
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["layer", "layers", "type"]
    assert [line.split()[:3] for line in lines[1:]] == [["{0..39}.1", "40", "BatchNorm2d"], ["40", "1", "LayerNorm"]]


def test_the_repr_of_a_plan_is_one_line_and_its_text_the_table_of_convert() -> None:
    made = plan(deep(), "gn", groups=2)
    assert repr(made) == "<Plan: 40 bn to gn; 1 kept>"
    lines = str(made).splitlines()
    assert lines[1].split() == ["{0..39}.1", "40", "4", "BatchNorm2d", "gn", "(2", "groups)", "folded"]
    assert lines[-1].split()[:3] == ["40", "1", "ln"]


def test_a_notebook_shows_tables_with_every_name_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.BatchNorm2d(4))
    for shown in (normswap.inspect(model), plan(model, "gn", groups=1)):
        page = shown._repr_html_()
        assert "<td>&lt;b&gt;</td>" in page
        assert page.count("<tr>") == 2
    empty = normswap.inspect(nn.Sequential())
    assert "0 norm layers" in empty._repr_html_()


def test_reports_are_short_and_show_themselves_in_a_notebook() -> None:
    model = deep(3)[:3].eval()
    report = normswap.verify(model, normswap.convert(model, to="gn", groups=1))
    assert "\n" not in repr(report)
    assert "layers" not in repr(report)
    assert report._repr_html_().startswith("<pre>8 random inputs")
