"""`--input`: shapes, whole numbers, masks and values, for networks that take several arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ran import Cli

WORDS = """
import torch
from torch import nn


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.conv, self.norm, self.head = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, words, lengths, mask):
        assert (words.dtype, lengths.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
        assert bool(mask.all()) and int(words.min()) >= 3 and int(words.max()) < 50
        assert lengths.tolist() in ([20, 10, 5, 3], [20, 10])
        x = torch.relu(self.norm(self.conv(self.words(words).transpose(1, 2))))
        x = x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None] * mask[:, None]
        return self.head(x.sum(2) / lengths[:, None])


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x, lens):
        assert lens.dtype == x.dtype and lens.tolist() == [1.0, 0.5]
        return self.norm(self.conv(x)) * lens[:, None, None]


def trained(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def words():
    return trained(Words())


def shares():
    return trained(Shares())
"""
LONG = """
import torch
from torch import nn


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)
        with torch.no_grad():
            x = self.conv(torch.randn(64, 4, 37))
        self.norm.running_mean.copy_(x.mean((0, 2)))
        self.norm.running_var.copy_(x.var((0, 2)))

    def forward(self, x):
        assert x.shape[2] == 37
        return self.norm(self.conv(x)).mean(2)


def net():
    return Long().eval()
"""
ASK = ("--input", "4,20:3..49", "--input", "4=20,10,5,3", "--input", "4,20:true")


@pytest.fixture(autouse=True)
def _sequences(folder: Path) -> None:
    (folder / "seq.py").write_text(WORDS, encoding="utf-8")


def test_whole_numbers_values_and_masks_reach_the_network(cli: Cli) -> None:
    ran = cli("convert", "seq.py:words", "--to", "gn", "--groups", 2, *ASK)
    assert ran.code == 0
    assert "Self-check: passed" in ran.out
    following = (
        "normswap verify words-gn.safetensors --trust-code --input 4,20:3..49 --input 4=20,10,5,3 --input 4,20:true"
    )
    assert following in ran.out
    ran = cli("verify", "words-gn.safetensors", "--trust-code", *ASK, "--json")
    assert ran.json["images"] == 4
    assert ran.json["error"] > 0


def test_values_that_are_not_all_whole_are_floating(cli: Cli) -> None:
    ran = cli("inspect", "seq.py:shares", "--input", "2,4,9", "--input", "2=1,0.5", "--json")
    assert ran.json["recorded"] is True


def test_each_number_of_a_range_may_be_drawn() -> None:
    from normswap.cli.arguments.inputs import GivenInput

    drawn = GivenInput((400,), between=(-1, 1)).tensor(torch.nn.Linear(1, 1))
    assert sorted(set(drawn.tolist())) == [-1, 0, 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "4,20:ture",
            "'ture' in '4,20:ture' is neither LOW..HIGH, such as 0..999, nor true or false. Did you mean true",
        ),
        ("4,20:0-9", "neither LOW..HIGH, such as 0..999, nor true or false."),
        ("4,20:9..0", "no whole number of 64 bits from 9 to 0"),
        ("4,20:", "neither LOW..HIGH"),
        ("2=4,x", "'x' in '2=4,x' is no number; values are given like 4=100,80,60,50"),
        ("1=", "'' in '1=' is no number"),
        ("1=nan", "'nan' in '1=nan' is no number"),
        ("4=1,2", "'4=1,2' has 2 values for a shape of 4"),
        ("=1,2", "'=1,2' is not like 1,3,224,224"),
        ("4x20", "'4x20' is not like 1,3,224,224 (a shape), 4,100:0..999 (whole numbers)"),
        ("0,3:true", "every size must be at least 1"),
    ],
)
def test_a_misspelt_input_is_told(cli: Cli, text: str, told: str) -> None:
    ran = cli("inspect", "seq.py:words", "--input", text)
    assert ran.code == 2
    assert told in " ".join(ran.err.split())
    assert "None" not in ran.err


def test_the_help_says_it(cli: Cli) -> None:
    assert "--input 4=100,80,60,50" in " ".join(cli("inspect", "--help").out.split())


# --- what `verify` concludes from them -------------------------------------------------------------------------------


def test_the_last_lines_say_what_random_inputs_show(cli: Cli) -> None:
    same = cli("verify", "nets.py:tiny", "nets.py:tiny").out.splitlines()[-2:]
    assert same[0] == "Verdict: A and B agree exactly on 8 random inputs, which says nothing about accuracy."
    assert same[1] == "A verdict that counts: normswap verify nets.py:tiny nets.py:tiny --data FOLDER"
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2).code == 0
    assert cli("convert", "nets.py:tiny", "--to", "frozen").code == 0
    differ = cli("verify", "tiny-gn.safetensors", "--trust-code", "--input", "5,3,9,9").out.splitlines()[-2:]
    assert differ[0].startswith("Verdict: A and B differ on 5 random inputs (relative error ")
    assert differ[1].endswith("normswap verify tiny-gn.safetensors --trust-code --data FOLDER")
    alike = cli("verify", "tiny-frozen.safetensors", "--trust-code").out
    assert "Verdict: A and B agree" in alike


def test_for_sequences_the_way_on_is_python(cli: Cli) -> None:
    assert cli("convert", "seq.py:words", "--to", "gn", "--groups", 2, *ASK).code == 0
    last = cli("verify", "words-gn.safetensors", "--trust-code", *ASK).out.splitlines()[-1]
    assert last == "A verdict that counts: normswap.verify(a, b, data) in Python takes data of your own"
    none = cli("verify", "words-gn.safetensors", "--trust-code")
    assert none.code == 1
    assert "--input 4,40,100 --input 4=100,80,60,50" in none.err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (ASK[:2], "Words does not run on the input given by --input (TypeError: Words.forward() missing 2 required"),
        (ASK[:4], "Words does not run on the 2 inputs given by --input (TypeError: Words.forward() missing 1 required"),
        (("--input", "4,20", *ASK[2:]), "Words does not run on the 3 inputs given by --input (AssertionError: "),
    ],
)
def test_inputs_that_the_network_does_not_run_on_are_told_with_what_forward_takes(
    cli: Cli, given: tuple[str, ...], told: str
) -> None:
    assert cli("convert", "seq.py:words", "--to", "gn", "--groups", 2, *ASK).code == 0
    ran = cli("verify", "words-gn.safetensors", "--trust-code", *given)
    assert ran.code == 1
    assert told in ran.err
    assert "once for each argument of Words.forward(words, lengths, mask), in that order" in ran.err
    assert "image" not in ran.err


def test_a_self_check_without_inputs_names_the_option(cli: Cli) -> None:
    ran = cli("convert", "seq.py:words", "--to", "gn", "--groups", 2)
    assert "Self-check: not run, no input is known that the network runs on; give --input\n" in ran.out
    values = cli("convert", "seq.py:words", "--to", "gn", "--groups", 2, "--force", "--json").json
    assert values["self_check"]["reason"].endswith("give --input")
    assert values["plan"]["meta"]["padding"] == ["norm"]


@pytest.mark.parametrize("given", [ASK, ()])
@pytest.mark.parametrize("groups", ["auto", "2"])
def test_made_inputs_are_not_promised_to_networks_of_several(cli: Cli, groups: str, given: tuple[str, ...]) -> None:
    what = "take one tensor of floating numbers, and this one takes 3 inputs\n"
    way = "normswap.calibrate in Python takes any"
    asked = ("convert", "seq.py:words", "--to", "gn", "--groups", groups, *given)
    ran = cli(*asked, "--calibrate", "synthetic")
    assert (ran.code, what in ran.err, way in ran.err) == (1, True, True)
    assert cli(*asked).code == 0
    ran = cli("calibrate", "words-gn.safetensors", "--data", "synthetic", "--trust-code")
    assert (ran.code, what in ran.err, way in ran.err) == (1, True, True)


def test_made_inputs_have_the_shape_that_was_given(cli: Cli, folder: Path) -> None:
    (folder / "long.py").write_text(LONG, encoding="utf-8")
    fixed = ("convert", "long.py:net", "--to", "gn", "--groups", "auto", "--calibrate", "synthetic")
    ran = cli(*fixed)
    assert "--input" in ran.err
    assert "normswap.calibrate in Python takes data of your own" in ran.err
    ran = cli(*fixed, "--input", "2,4,37", "--calibrate-images", "4", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["calibration"]["stand_ins"].startswith("4 synthetic inputs 4x37; ")


def test_images_have_figures_and_no_verdict(cli: Cli, images: Path) -> None:
    assert "erdict" not in cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", images).out
