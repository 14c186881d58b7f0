"""`normswap advise`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from ran import Cli


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--input", "1,3,24,20"),
        ("--task", "style"),
        ("--ema", "--data", "photos", "--size", "20"),
        ("--data", "photos", "--size", "20", "--mean", "0", "--std", "1"),
        ("--inference",),
    ],
)
def test_the_command_that_it_gives_works_when_pasted(cli: Cli, images: Path, options: tuple[str, ...]) -> None:
    ran = cli("advise", "nets.py:real", *options)
    assert ran.code == 0, ran.err
    line = ran.out.splitlines()[-1]
    assert line.startswith("Next: normswap convert nets.py:real ")
    pasted = cli(*shlex.split(line.removeprefix("Next: normswap ")))
    assert pasted.code == 0, pasted.err


@pytest.mark.parametrize(
    ("options", "repair"),
    [
        ((), "--calibrate photos"),
        (("--input", "1,3,24,20"), "--calibrate photos --size 24,20"),
    ],
)
def test_without_images_the_command_repairs_on_photographs_and_works(
    cli: Cli, options: tuple[str, ...], repair: str
) -> None:
    ran = cli("advise", "nets.py:real", *options)
    line = ran.out.splitlines()[-1]
    assert line.endswith(repair)
    assert "photographs that come with normswap" in ran.out
    pasted = cli(*shlex.split(line.removeprefix("Next: normswap ")), "--calibrate-images", "26")
    assert pasted.code == 0, pasted.err
    assert "crops of photographs" in pasted.out


def test_a_folder_named_like_the_photographs_is_not_what_the_command_names(cli: Cli, images: Path) -> None:
    assert images.name == "photos"
    assert "--calibrate" not in (out := cli("advise", "nets.py:real").out)
    assert "photographs" not in out


@pytest.mark.parametrize("source", ["nets.py:Detector", "nets.py:fresh"])
def test_no_photographs_are_named_for_boxes_and_statistics_that_say_nothing(cli: Cli, source: str) -> None:
    ran = cli("advise", source)
    assert ran.code == 0, ran.err
    assert "--calibrate" not in ran.out


def test_the_page_says_norm_reason_source_and_drift(cli: Cli) -> None:
    out = cli("advise", "nets.py:tiny", "--private").out
    for what in ("gn: one sample's gradient", "De et al. 2022, arXiv:2204.13650", "expected at the output", "2: "):
        assert what in out


def test_a_size_that_was_guessed_is_called_a_guess_and_one_that_was_given_is_not(cli: Cli) -> None:
    assert "inputs 3x64x64, a guess: --input says another" in cli("advise", "nets.py:tiny").out
    asked = cli("advise", "nets.py:tiny", "--input", "1,3,32,32").out
    assert "inputs 3x32x32\n" in asked
    assert "guess" not in asked


def test_only_numbers_of_groups_that_some_norm_can_have_are_listed(cli: Cli) -> None:
    assert list(cli("advise", "nets.py:tiny", "--json").json["drift_by_groups"]) == ["1", "2", "4", "8", "16"]


def test_json_holds_the_command(cli: Cli) -> None:
    values = cli("advise", "nets.py:tiny", "--json").json
    assert values["norm"] == "gn"
    assert values["command"].startswith("normswap convert nets.py:tiny --to gn --groups auto")
    assert cli("advise", "nets.py:tiny", "--batch-size", "32", "--json").json["command"] is None


def test_options_of_the_network_are_in_the_command(cli: Cli) -> None:
    out = cli("advise", "nets.py:tiny", "--arg", "width=16", "--seed", "3").out
    assert "normswap convert nets.py:tiny --arg width=16 --seed 3 --to gn" in out


@pytest.mark.parametrize("task", ["classification", "sequence", "style"])
def test_inputs_that_were_given_are_in_the_command(cli: Cli, task: str) -> None:
    given = ("--input", "2,3,24,20")
    assert " --input 2,3,24,20" in cli("advise", "nets.py:tiny", "--task", task, *given, "--json").json["command"]


def test_unknown_norms_are_kept_in_the_command(cli: Cli) -> None:
    ran = cli("advise", "nets.py:suspicious")
    assert ran.out.splitlines()[-1].endswith("--rule 3=keep")


def test_a_detector_is_advised_without_a_drift(cli: Cli) -> None:
    ran = cli("advise", "nets.py:Detector", "--task", "detection")
    assert ran.code == 0, ran.err
    assert "drift" not in ran.out


@pytest.mark.parametrize(
    ("args", "code", "what"),
    [
        (
            ("nets.py:without_norm",),
            1,
            "no BatchNorm layer to advise about: it has no norm layer at all",
        ),
        (("nets.py:tiny", "--task", "detecton"), 2, "Did you mean detection?"),
        (("nets.py:tiny", "--batch-size", "0"), 2, "greater than or equal to 1"),
        (
            ("nets.py:tiny", "--inference", "--ema"),
            2,
            "for a network that is not trained; --ema is of one",
        ),
        (("nets.py:tiny", "--mean", "0"), 2, "--mean goes with --data: add --data FOLDER"),
        (("nets.py:tiny", "--size", "32"), 2, "or say --input 1,3,32,32 for the drift at that size"),
        (("nets.py:tiny", "--data", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(cli: Cli, args: tuple[str, ...], code: int, what: str) -> None:
    ran = cli("advise", *args)
    assert (ran.code, ran.out) == (code, "")
    assert what in " ".join(ran.err.split())
