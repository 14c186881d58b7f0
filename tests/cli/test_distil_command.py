from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from ran import Cli
from torch import nn

import normswap


@pytest.fixture
def converted(cli: Cli, images: Path) -> str:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", "--calibrate", "photos", "--method", "moments")
    assert ran.code == 0, ran.err
    return "tiny-gn.safetensors"


def distil(cli: Cli, file: str, *more: str):
    return cli("distil", file, "--data", "photos", "--trust-code", "--batch-size", "4", "--steps", "12", *more)


def test_the_distilled_file_is_nearer_to_the_original(cli: Cli, converted: str) -> None:
    ran = distil(cli, converted, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"] == 12
    assert ran.json["loss_last"] < ran.json["loss_first"]
    assert ran.json["output"] == "tiny-gn-distilled.safetensors"
    assert not Path("tiny-gn-distilled.safetensors.training").exists()
    record = normswap.load("tiny-gn-distilled.safetensors", trust_code=True)._normswap
    assert [entry.action for entry in record.history] == ["calibrate", "distil"]


def test_the_same_seed_gives_the_same_file(cli: Cli, converted: str) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        assert distil(cli, converted, "--output", name).code == 0
    one, two = (normswap.load(f, trust_code=True).state_dict() for f in ("one.safetensors", "two.safetensors"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_training_the_norms_leaves_the_convolutions(cli: Cli, converted: str) -> None:
    assert distil(cli, converted, "--train", "norm", "--augment", "auto", "--lr", "0.01").code == 0
    before = normswap.load(converted, trust_code=True)
    after = normswap.load("tiny-gn-distilled.safetensors", trust_code=True)
    assert torch.equal(before[0].weight, after[0].weight)
    assert not torch.equal(before[1].weight, after[1].weight)


def test_too_few_images_for_a_batch_are_named(cli: Cli, converted: str) -> None:
    ran = cli("distil", converted, "--data", "photos", "--trust-code")
    assert ran.code == 1
    assert "12 images" in ran.err
    assert "--batch-size" in ran.err


def test_a_stopped_command_says_how_to_go_on(cli: Cli, converted: str) -> None:
    calls: list[nn.Module] = []

    def stop(module: nn.Module, *_: object) -> None:
        calls.append(module)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGINT)

    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: stop(m) if isinstance(m, nn.Linear) else None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ran = distil(cli, converted)
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)
    assert ran.code == 130, ran.err
    assert "(interrupted)" in ran.out
    assert "Next: the same command with --resume goes on from there" in ran.out
    again = distil(cli, converted, "--resume")
    assert again.code == 0, again.err
    assert "Next" not in again.out


def test_resuming_what_never_began_is_an_error(cli: Cli, converted: str) -> None:
    ran = distil(cli, converted, "--resume")
    assert ran.code == 1
    assert "resume" in ran.err


def test_the_closing_lines_are_about_the_same_images_and_what_was_kept(cli: Cli, converted: str) -> None:
    ran = distil(cli, converted, "--lr", "9", "--steps", "4")
    assert ran.code == 0, ran.err
    assert "4 steps; kept is the state of step 0" in ran.out
    assert "3 images held back" in ran.out
    assert "the network is as it was" in ran.out
    before, after = (normswap.load(f, trust_code=True) for f in (converted, "tiny-gn-distilled.safetensors"))
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())
    loss = next(line for line in ran.out.splitlines() if line.startswith("loss"))
    first, last = loss.removeprefix("loss").split(",")[:2]
    assert float(first) == float(last.removeprefix(" after "))
