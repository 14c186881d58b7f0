"""What commands write to: nothing that they read, nothing that is no safetensors file, nothing that others write."""

from __future__ import annotations

from pathlib import Path

import pytest
from locks import held_elsewhere
from ran import Cli

WORK = {
    "calibrate": ("--data", "photos", "--trust-code"),
    "distil": ("--data", "photos", "--trust-code", "--batch-size", "4", "--steps", "2"),
}
FINETUNE = ("--data", "photos", "--trust-code", "--steps", "1", "--device", "cpu", "--output", "run")


@pytest.fixture
def converted(cli: Cli, images: Path) -> str:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "-o", "net.safetensors").code == 0
    return "net.safetensors"


@pytest.mark.parametrize("command", WORK)
def test_what_a_command_reads_is_never_written_over(cli: Cli, converted: str, command: str) -> None:
    before = Path(converted).read_bytes()
    for output, said in ((converted, "is read by the same command"), ("nets.py", "Name it nets.safetensors.")):
        ran = cli(command, converted, *WORK[command], "-o", output, "--force")
        assert (ran.code, said in ran.err) == (1, True), ran.err
    assert Path(converted).read_bytes() == before
    Path("w.safetensors").write_bytes(before)
    reference = ("--reference", "nets.py:tiny", "--weights", "w.safetensors")
    ran = cli(command, converted, *WORK[command], *reference, "-o", "w.safetensors", "--force")
    assert "w.safetensors is read by the same command" in ran.err


def test_a_run_never_replaces_the_network_it_begins_with(cli: Cli, converted: str) -> None:
    Path("run").mkdir()
    file = Path(converted).rename("run/best.safetensors")
    before = file.read_bytes()
    ran = cli("finetune", str(file), *FINETUNE, "--force")
    assert (ran.code, "best.safetensors is read by the same command" in ran.err) == (1, True), ran.err
    ran = cli("finetune", "nets.py:tiny", "--weights", str(file), *FINETUNE, "--force")
    assert (ran.code, "best.safetensors is read by the same command" in ran.err) == (1, True), ran.err
    assert file.read_bytes() == before
    assert [p.name for p in Path("run").iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize("command", [*WORK, "convert", "finetune"])
def test_a_place_that_another_process_writes_is_refused_and_the_process_named(
    cli: Cli, converted: str, command: str
) -> None:
    if command == "finetune":
        Path("run").mkdir()
        arguments, place = (converted, *FINETUNE), "run"
    elif command == "convert":
        arguments, place = ("nets.py:chatty", "--to", "gn", "-o", "out.safetensors"), "out.safetensors"
    else:
        arguments, place = (converted, *WORK[command], "-o", "out.safetensors"), "out.safetensors"
    with held_elsewhere(Path(place)) as process:
        ran = cli(command, *arguments)
        assert ran.code == 1
        assert f"error: {place} is being written by process {process.pid}, since 2" in ran.err
        assert "own words" not in ran.err  # before the network is built
    ran = cli(command, *arguments)
    assert ran.code == 0, ran.err
    assert not list(Path().rglob("*.lock"))


def test_a_folder_made_for_a_run_that_fails_goes_again(cli: Cli, images: Path) -> None:
    for arguments, code in ((("nets.py:without_norm",), 1), (("nets.py:tiny", "--train", "nothing*"), 2)):
        ran = cli("finetune", *arguments, "--data", str(images), "--device", "cpu", "--output", "deep/in/run")
        assert ran.code == code, ran.err
        assert not Path("deep").exists()
