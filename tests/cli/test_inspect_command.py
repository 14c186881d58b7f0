from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli

import normswap
from normswap.cli import app


def test_every_norm_is_listed_with_what_feeds_it(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:residual")
    assert ran.code == 0
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.startswith(("norm", "after"))}
    assert rows["norm"] == ["norm", "1", "BatchNorm2d", "8", "1e-05", "yes", "train", "conv", "yes"]
    assert rows["after"][-2:] == ["sum", "no"]
    assert "2 norm layers (2 bn); the statistics of 1 of 2 can be folded, the others prescaled" in ran.out


def test_repeated_layers_are_one_row_and_all_shows_each(cli: Cli) -> None:
    assert "{0..11}.1" in cli("inspect", "nets.py:deep").out
    shown = cli("inspect", "nets.py:deep", "--all").out
    assert all(f"\n{i}.1 " in "\n" + shown for i in range(12))
    assert "conv 11.0" in shown


def test_what_a_row_is_called_is_a_rule_for_its_layers(cli: Cli) -> None:
    rows = [line.split() for line in cli("inspect", "nets.py:deep").out.splitlines() if "BatchNorm2d" in line]
    assert rows
    for name, count, *_ in rows:
        matched = cli("inspect", "nets.py:deep", "--rule", f"{name}=gn", "--json").json["rules"][0]["layers"]
        assert len(matched) == int(count)


def test_json_is_what_the_api_says(cli: Cli, nets: Any) -> None:
    ran = cli("inspect", "nets.py:residual", "--json")
    expected = normswap.inspect(nets.residual()).to_dict()
    assert ran.json["layers"] == json.loads(json.dumps(expected["layers"]))
    assert ran.json["network"]["source"]["name"] == "nets.py:residual"
    assert ran.json["recorded"] is False


def test_given_input_shapes_the_network_is_run(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:tiny", "--input", "2,3,16,16", "--json")
    assert ran.json["recorded"] is True
    assert ran.json["layers"][0]["feed"]["positions"] == 14 * 14


def test_an_input_that_does_not_fit_is_named(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:tiny", "--input", "2,5,16,16")
    assert ran.code == 1
    assert "cannot run on the example inputs" in ran.err


@pytest.mark.parametrize("shape", ["3,x", "0,3", "", "1,-2"])
def test_a_shape_that_is_none_is_a_usage_error(cli: Cli, shape: str) -> None:
    ran = cli("inspect", "nets.py:tiny", "--input", shape)
    assert ran.code == 2
    assert "--input" in ran.err


def test_what_convert_cannot_handle_is_listed_at_the_end(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:suspicious")
    assert ran.code == 0
    end = ran.out[ran.out.index("Not known") :]
    assert "overrides the forward" in end
    assert "1 suspect" in end


def test_a_network_without_norms_is_no_error(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:without_norm")
    assert (ran.code, ran.out.strip()) == (0, "nets.py:without_norm: 0 norm layers")


def test_names_are_printed_as_they_are(cli: Cli) -> None:
    assert "[bold] norm" in cli("inspect", "nets.py:bracketed").out
    assert "conv [red]läyer[/red]" in cli("inspect", "nets.py:bracketed", "--all").out


def test_an_encoding_without_the_letters_does_not_stop_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit) as end:
        app(["inspect", "nets.py:bracketed", "--all"])
    assert not end.value.code
    assert rb"[red]l\xe4yer[/red]" in stream.buffer.getvalue()


def test_builder_arguments_reach_the_builder(cli: Cli) -> None:
    assert cli("inspect", "nets.py:tiny", "--arg", "width=24", "--json").json["layers"][0]["channels"] == 24


def test_a_named_model_is_built_without_weights_or_download(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("inspect downloads nothing")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    ran = cli("inspect", "resnet18", "--json")
    assert len(ran.json["layers"]) == 20
    assert len(cli("inspect", "resnet18", "--weights", "IMAGENET1K_V1", "--json").json["layers"]) == 20


def test_a_checkpoint_given_has_to_fit(cli: Cli, nets: Any) -> None:
    torch.save(nets.tiny(width=8).state_dict(), "mine.pth")
    assert cli("inspect", "nets.py:tiny", "--weights", "mine.pth").code == 0
    ran = cli("inspect", "nets.py:tiny", "--weights", "mine.pth", "--arg", "width=16")
    assert ran.code == 1
    assert "mis-shaped" in ran.err


def test_a_converted_file_shows_its_new_norms(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4).code == 0
    ran = cli("inspect", "tiny-gn.safetensors", "--trust-code")
    assert "GroupNorm (4 groups)" in ran.out
    assert "no statistics" in ran.out
    refused = cli("inspect", "tiny-gn.safetensors")
    assert refused.code == 1
    assert "--trust-code" in refused.err
    assert cli("inspect", "tiny-gn.safetensors", "--trust-code", "--weights", "none").code == 2


def test_json_stays_clean_when_the_users_code_prints(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:chatty", "--json")
    assert len(ran.json["layers"]) == 2
    assert "a user's own words" in ran.err


def test_quiet_prints_nothing_but_errors(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:chatty", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert cli("inspect", "nets.py:nothing", "--quiet").err.startswith("error: ")


def test_quiet_and_verbose_exclude_each_other(cli: Cli) -> None:
    assert cli("inspect", "nets.py:tiny", "--quiet", "--verbose").code == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("resnet51", "Did you mean resnet50"),
        ("nets.py", "names a file but no factory"),
        ("nets.py:tinny", "Did you mean tiny"),
        ("nets.py:leaves", "cannot be built (SystemExit: 3)"),
        ("missing.py:build", "missing.py does not exist"),
        ("no.such.module:build", "cannot be imported"),
        ("what is this:", "unknown model"),
        ("missing.safetensors", "missing.safetensors does not exist"),
        ("weights.pth", "weights.pth does not exist"),
    ],
)
def test_a_source_that_is_none_gets_one_clear_message(cli: Cli, source: str, said: str) -> None:
    ran = cli("inspect", source)
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_file_that_is_not_ours_is_named(cli: Cli, folder: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"not safetensors")
    (folder / "empty.safetensors").write_bytes(b"")
    for name in ("broken", "empty"):
        ran = cli("inspect", f"{name}.safetensors")
        assert ran.code == 1
        assert f"{name}.safetensors is not a complete safetensors file" in ran.err
