"""`normswap finetune --config`: options from a file, and back into one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from ran import Cli

import normswap

NET = ("finetune", "nets.py:tiny", "--weights", "none", "--trust-code", "--data", "photos", "--device", "cpu")
SHORT = ("--steps", "3", "--calibrate-images", "4", "--to", "gn", "--groups", "4")


def weights(folder: str) -> dict[str, torch.Tensor]:
    return normswap.load(Path(folder, "last.safetensors"), trust_code=True).state_dict()


def same(one: str, two: str) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def printed(cli: Cli, *args: str) -> dict[str, object]:
    ran = cli("finetune", "--print-config", *args)
    assert ran.code == 0, ran.err
    found = yaml.safe_load(ran.out)
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("images")
def test_run_json_repeats_its_run_bit_for_bit(cli: Cli) -> None:
    odd = ("--lr", "3e-3", "--mean", "0.1,0.2,0.3", "--std", "0.5", "--size", "12,14", "--rule", "4=keep", "--ema")
    assert cli(*NET, *SHORT, *odd, "--seed", "5", "-o", "one").code == 0
    ran = cli("finetune", "--config", "one/run.json", "--output", "two")
    assert ran.code == 0, ran.err
    assert same("one", "two")
    options = [json.loads(Path(name, "run.json").read_text())["options"] for name in ("one", "two")]
    assert options[0] | {"output": "two"} == options[1]
    third = cli("finetune", "--config", "one/run.json", "--output", "three", "--seed", "6")
    assert third.code == 0, third.err
    assert not same("one", "three")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_a_file_says_what_the_flags_would(cli: Cli, kind: str) -> None:
    assert cli(*NET, *SHORT, "--freeze-affine", "--lr", "1e-3", "--rule", "4=keep", "-o", "flags").code == 0
    text = """source: nets.py:tiny\nweights: none\ntrust-code: true\ndata: photos\ndevice: cpu\nsteps: 3
calibrate-images: 4\nto: gn\ngroups: 4\nfreeze_affine: true\nlr: 1e-3\nrule: {4: keep}\noutput: file\nepochs: null\n"""
    if kind == "toml":
        lines = [line.partition(": ") for line in text.splitlines()[:-1]]
        said = {name: value if value in ("true", "3", "4", "1e-3") else f'"{value}"' for name, _, value in lines}
        text = "".join(f"{name} = {value}\n" for name, value in (said | {"rule": '{4 = "keep"}'}).items())
    Path(f"run.{kind}").write_text(text)
    ran = cli("finetune", "--config", f"run.{kind}")
    assert ran.code == 0, ran.err
    assert same("flags", "file")


@pytest.mark.usefixtures("images")
def test_what_is_printed_gives_the_same_run(cli: Cli) -> None:
    said = (*NET[1:], *SHORT, "--seed", "3", "--rule", "4=keep")
    ran = cli("finetune", *said, "--print-config")
    assert ran.code == 0, ran.err
    Path("run.yaml").write_text(ran.out)
    assert not Path("runs").exists()
    for more in (
        ("-o", "one", *NET[1:], *SHORT, "--seed", "3", "--rule", "4=keep"),
        ("-o", "two", "--config", "run.yaml"),
    ):
        assert cli("finetune", *more).code == 0
    assert same("one", "two")


def test_print_config_needs_no_network_and_comes_back_as_it_went(cli: Cli) -> None:
    usual = printed(cli)
    assert usual["source"] is None
    assert "report" not in usual
    assert printed(cli, "--report", "page.html")["report"] == "page.html"
    assert usual["batch_size"] == 2
    said = (
        "net",
        "--data",
        "photos",
        "--lr",
        "1e-7",
        "--ema",
        "--channels-first",
        "--arg",
        "x=[1, 2]",
        "--size",
        "9,8",
    )
    first = printed(cli, *said)
    assert (first["lr"], first["ema"], first["channels_last"], first["arg"]) == (1e-7, True, False, ["x=[1, 2]"])
    Path("run.yaml").write_text(yaml.safe_dump(first))
    assert printed(cli, "--config", "run.yaml") == first


def test_the_number_of_rand_augment_may_be_left_out(cli: Cli) -> None:
    for said, number in (
        (["--rand-augment"], 2),
        (["--rand-augment", "5"], 5),
        (["--rand-augment", "net"], 2),
        ([], None),
    ):
        assert printed(cli, *said)["rand_augment"] == number


def test_flags_win_over_the_file_and_drop_what_they_exclude(cli: Cli) -> None:
    Path("run.yaml").write_text(
        "source: net\ndata: photos\nepochs: 3\nto: gn\ngroups: 4\nbatch_size: 8\nrule: [a=gn]\n"
    )
    found = printed(cli, "--config", "run.yaml", "--steps", "5", "--batch-size", "1", "--rule", "b=ln", "other")
    assert (found["source"], found["steps"], found["epochs"], found["batch_size"]) == ("other", 5, None, 1)
    assert found["rule"] == ["b=ln"]
    found = printed(cli, "--config", "run.yaml", "--channels-per-group", "4")
    assert (found["groups"], found["channels_per_group"], found["epochs"]) == (None, 4, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 4", "batch_sise is no option of normswap finetune\nDid you mean batch_size"),
        ("zzz: 4", "--print-config"),
        ("config: other.yaml", "config is no option"),
        ("batch_size: two", "batch_size must be a whole number, got two"),
        ("batch_size: 2.5", "batch_size must be a whole number, got 2.5"),
        ("batch_size: 0", "run.yaml: batch_size: "),
        ("lr: fast", "lr must be a number, got fast"),
        ("seed: true", "seed must be a whole number, got true"),
        ("lr: [1, 2]", "lr must be a number, got [1, 2]"),
        ("ema: 1", "ema must be true or false, got 1"),
        ("to: false", "to must be a text, got false"),
        ("output: 3", "output must be a path, got 3"),
        ("optimizer: adam", "optimizer: 'adam' is not one of adamw, sgd"),
        ("batch-size: 1\nbatch_size: 2", "given twice"),
        ("- batch_size", "holds no options"),
        ("", "holds no options"),
        ("a: b: c", "is no valid YAML: mapping values are not allowed here, line 1"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(cli: Cli, text: str, words: str) -> None:
    Path("run.yaml").write_text(text)
    ran = cli("finetune", "net", "--data", "photos", "--config", "run.yaml")
    assert ran.code == 2
    assert words in ran.err
    assert "run.yaml" in ran.err
    assert "Traceback" not in ran.err
    assert "bug" not in ran.err


def test_a_file_that_is_not_there_or_of_another_kind_is_told(cli: Cli) -> None:
    Path("run.ini").write_text("")
    Path("bad.toml").write_text("a = = 1")
    Path("bad.json").write_text("{")
    for name, words in {
        "no.yaml": "does not exist", "run.ini": "neither YAML nor TOML", "bad.toml": "no valid TOML",
        "bad.json": "no valid JSON", ".": "cannot be read",
    }.items():  # fmt: skip
        ran = cli("finetune", "net", "--config", name)
        assert (ran.code, words in ran.err) == (2, True), ran.err
