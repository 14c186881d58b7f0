"""`--report FILE.html`: one page, well formed, without anything from elsewhere, that shows what the command found."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ran import Cli, Ran

VOID = {"meta", "br", "hr", "img", "link", "input"}
LOADING = {"src", "href", "srcset", "action", "data", "xlink:href", "background", "poster", "style"}

HOSTILE = """
import torch
from torch import nn


class Nasty(nn.Module):
    def __init__(self):
        super().__init__()
        self.names = ["<script>alert(1)</script>", "\\" onload=\\"alert(2)"]
        self.names += ["</pre></details>{{ 7*7 }}", "a\\x1b[31m\\u202eb"]
        for name in self.names:
            block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.add_module(name, block)
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        for name in self.names:
            x = self._modules[name](x)
        return self.out(x.mean((2, 3)))


def nasty():
    torch.manual_seed(0)
    model = Nasty()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()
"""


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def charts(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]

    def check(self) -> Page:
        """Nothing runs, nothing is fetched."""
        assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(self.tags)
        assert not [name for name, _ in self.attributes if name in LOADING or name.startswith("on")]
        style = re.findall(r"<style>(.*?)</style>", self.source, re.DOTALL)
        assert len(style) == 1
        assert not re.search(r"url\(|@import|@font-face|//", style[0])
        assert "default-src 'none'" in self.source
        for scheme in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
            assert scheme in self.source
        return self


def reported(cli: Cli, *arguments: object) -> tuple[Ran, Page]:
    ran = cli(*arguments, "--report", "page.html", "--json")
    assert ran.code == 0, ran.err
    return ran, Page(Path("page.html")).check()


def test_convert_shows_every_layer_with_what_feeds_it_and_how_to_undo_it(cli: Cli) -> None:
    ran, page = reported(cli, "convert", "nets.py:residual", "--to", "gn", "--groups", "2", "--rule", "norm=keep")
    for step in ran.json["plan"]["steps"]:
        assert f'title="{step["path"]}"' in page.source
        assert all(producer in page.text for producer in step["producers"])
    for kept in ran.json["plan"]["kept"]:
        assert kept["reason"] in page.text
    assert "gn (2 groups, eps 1)" in page.text
    assert "network 1 bn to gn, 1 kept" in page.text
    assert f"{ran.json['self_check']['error']:.1e}" in page.text
    assert "normswap convert --to original --trust-code residual-gn.safetensors" in page.text
    assert "normswap convert nets.py:residual --to gn --groups 2" in page.text
    assert "sha256" in page.text
    undone = cli("convert", "residual-gn.safetensors", "--to", "original", "--trust-code", "--report", "undone.html")
    assert undone.code == 0, undone.err
    assert "bit for bit" in Page(Path("undone.html")).check().text


def test_a_file_that_cannot_be_undone_is_told_no_way_to_undo_it(cli: Cli) -> None:
    _, page = reported(cli, "convert", "nets.py:tiny", "--to", "gn", "--groups", "2", "--no-undo")
    assert "How to undo it" not in page.text


def test_verify_draws_the_drift_with_the_first_jump_marked(cli: Cli, images: Path) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "2").code == 0
    ran, page = reported(cli, "verify", "tiny-gn.safetensors", "--trust-code", "--data", "photos")
    (chart,) = page.charts()
    titles = [title.text for title in chart.iter("title")]
    assert titles == [f"{layer['path']}: {layer['error']:.3g}" for layer in ran.json["layers"]]
    marks = [each.text for each in chart.iter("text") if each.get("class", "").startswith("marked")]
    assert marks == [f"first jump: {ran.json['first_jump']}"]
    assert f"{ran.json['accuracy_b']:.4f}" in page.text
    heights = [float(dot.get("cy", "nan")) for dot in chart.iter("circle")]
    errors = [layer["error"] for layer in ran.json["layers"]]
    assert len(set(heights)) == len(set(errors)) > 1
    assert sorted(heights, reverse=True) == [heights[i] for i in sorted(range(len(errors)), key=errors.__getitem__)]


def test_calibrate_and_distil_show_before_and_after_and_a_chart(cli: Cli, images: Path) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "2").code == 0
    fixed = ("tiny-gn.safetensors", "--trust-code", "--data", "photos", "--device", "cpu")
    ran, page = reported(cli, "calibrate", *fixed)
    assert f"{ran.json['drift_after']:.4f}" in page.text or f"{ran.json['drift_after']:.3g}" in page.text
    assert len(list(page.charts()[0].iter("polyline"))) == 2
    Path("page.html").unlink()
    ran, page = reported(cli, "distil", *fixed, "--steps", "4", "--batch-size", "4")
    assert [step for step, _ in ran.json["losses"]] == [1, 2, 3, 4]
    assert ran.json["eval_losses"][0] == [0, pytest.approx(ran.json["eval_loss_before"])]
    assert len(page.charts()) == 1


def test_finetune_shows_its_curves(cli: Cli, images: Path) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "2").code == 0
    fixed = ("tiny-gn.safetensors", "--trust-code", "--data", "photos", "--device", "cpu")
    _, page = reported(cli, "finetune", *fixed, "--epochs", "1", "-o", "run")
    assert [chart.get("aria-label") for chart in page.charts()] == [
        "loss over epoch",
        "accuracy over epoch",
        "confusion matrix",
    ]
    assert re.search(r"normswap convert --to original( --approximate)? --trust-code run/best.safetensors", page.text)
    assert "report" not in json.loads(Path("run/run.json").read_text())["options"]


def test_evaluate_draws_the_confusion_and_lists_the_classes(cli: Cli, images: Path) -> None:
    ran, page = reported(cli, "evaluate", "nets.py:tiny", "--data", "photos")
    (chart,) = page.charts()
    drawn = {each.text for each in chart.iter("title")}
    names = ran.json["names"]
    assert {f"{names[i]}, predicted {names[j]}: {count}" for i, j, count in ran.json["confusion"]} <= drawn
    for each in ran.json["classes"]:
        assert f"{each['name']} {each['count']} {each['value']:.4f}" in page.text


def test_names_of_strangers_are_text_whatever_is_in_them(cli: Cli, images: Path) -> None:
    Path("bad.py").write_text(HOSTILE, encoding="utf-8")
    shutil.move("photos/red", "photos/<img src=x onerror=alert(3)>")
    shutil.move("photos/blue", "photos/{{ config }}\udcff")
    _, page = reported(cli, "convert", "bad.py:nasty", "--to", "gn", "--groups", "1")
    assert "<script>alert(1)</script>" in page.text
    assert "</pre></details>{{ 7*7 }}" in page.text
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    Path("page.html").unlink()
    _, page = reported(cli, "verify", "nasty-gn.safetensors", "--trust-code", "--data", "photos")
    assert len(page.charts()) == 1
    Path("page.html").unlink()
    _, page = reported(cli, "evaluate", "bad.py:nasty", "--data", "photos")
    assert "<img src=x onerror=alert(3)>" in page.text
    assert "{{ config }}" in page.text
    assert len(page.charts()) == 1


def test_a_place_where_no_report_can_go_is_told_before_any_work(cli: Cli) -> None:
    ask = ["verify", "nets.py:tiny", "nets.py:tiny"]
    ran = cli(*ask, "--report", "page.pdf")
    assert (ran.code, ran.out) == (1, "")
    assert "page.pdf is not a name for a report\nName it page.html." in ran.err
    assert "there is no" in (none := cli(*ask, "--report", "no/page.html").err) or "does not exist" in none
    assert cli(*ask, "--report", "page.html").code == 0
    assert "page.html exists already" in cli(*ask, "--report", "page.html").err
    ran = cli(*ask, "--report", "page.html", "--force")
    assert ran.code == 0
    assert ran.out.endswith("Report: page.html\n")


def test_a_dry_run_is_reported_too(cli: Cli) -> None:
    ran, page = reported(cli, "convert", "nets.py:tiny", "--to", "gn", "--groups", "2", "--dry-run")
    assert ran.json["output"] is None
    assert "nothing was written" in page.text
    assert not Path("tiny-gn.safetensors").exists()


def test_the_report_and_the_exit_code_3_go_together(cli: Cli, images: Path) -> None:
    ran = cli("evaluate", "nets.py:tiny", "--data", "photos", "--fail-below", "1", "--report", "page.html", "--quiet")
    assert ran.code == 3
    assert Page(Path("page.html")).check().charts()


def test_compare_shows_its_curves_its_table_and_what_they_rest_on(cli: Cli, images: Path) -> None:
    fixed = ("nets.py:tiny", "--data", "photos", "--size", "20", "--calibrate-images", "8")
    ran, page = reported(cli, "compare", *fixed, "--groups", "1,3,4", "-o", "groups")
    (chart,) = page.charts()
    assert chart.get("aria-label") == "accuracy over groups"
    assert [text for text in ("1", "3", "4") if text in {each.text for each in chart.iter("text")}] == ["1", "3", "4"]
    titles = [title.text for title in chart.iter("title")]
    for cell in ran.json["cells"]:
        assert f"{cell['accuracy']:.4f}" in page.text
        told = cell["norm"] if cell["groups"] is None else "gn, calibrated"
        assert f"{told}: {cell['accuracy']:.3g}" in titles
    assert "accuracy on 4 validation images, of which one makes 0.2500" in page.text
    assert "does not divide all channels: 2 in 2 layers" in page.text
    assert "normswap compare nets.py:tiny --data photos" in page.text
    again = cli("compare", *fixed, "--groups", "1,3,4,8", "-o", "groups", "--report", "page.html")
    assert again.code == 0, again.err
    assert len(Page(Path("page.html")).check().charts()) == 1


def test_compare_shows_the_curves_of_its_trainings(cli: Cli, images: Path) -> None:
    fixed = ("nets.py:tiny", "--data", "photos", "--size", "20", "--calibrate-images", "8", "--epochs", "2")
    _, page = reported(cli, "compare", *fixed, "--norms", "bn,frozen", "--batch-sizes", "2,4", "-o", "all")
    labels = [chart.get("aria-label") for chart in page.charts()]
    curves = ["loss over epoch", "loss over epoch", "accuracy over epoch", "accuracy over epoch"]
    assert labels == ["error over batch size", *curves, *curves]
    assert all(len(list(chart.iter("polyline"))) == 2 for chart in page.charts())
    assert "Batch size 4: validation accuracy" in page.text


def test_advise_shows_reason_risks_drift_and_the_command(cli: Cli) -> None:
    ran, page = reported(cli, "advise", "nets.py:tiny", "--private")
    (chart,) = page.charts()
    assert chart.get("aria-label") == "relative error of the output over groups"
    for text in (ran.json["reason"], ran.json["command"], *(risk["text"] for risk in ran.json["risks"])):
        assert text in page.text
    for drift in ran.json["drift_by_groups"].values():
        assert f"{drift:.4f}" in page.text
