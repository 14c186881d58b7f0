"""Numbers far beyond what a machine takes are the user's to mend: one clear sentence, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from ran import Cli

HUGE = "100000000"
FINETUNE = ("finetune", "nets.py:tiny", "--weights", "none", "--data", "photos", "--device", "cpu", "--steps", "1")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*FINETUNE, "--workers", "1000"), 2, "--workers"),
        ((*FINETUNE, "--size", "1000000"), 2, "--size"),
        ((*FINETUNE, "--num-classes", "100000000000"), 2, "--num-classes"),
        ((*FINETUNE, "--seed", "9" * 23), 2, "--seed"),
        (("convert", "nets.py:tiny", "--weights", "none", "--to", "gn", "--seed", "9" * 23), 2, "--seed"),
        (("inspect", "nets.py:tiny", "--input", f"1,3,{HUGE},{HUGE}"), 2, "--input"),
        (("inspect", "nets.py:tiny", "--input", f"{HUGE},3,{HUGE},{HUGE}"), 2, "--input"),
        (("verify", "nets.py:tiny", "nets.py:tiny", "--input", f"{HUGE},3,224,224"), 2, "--input"),
        (("verify", "nets.py:tiny", "nets.py:tiny", "--data", "photos", "--size", "1000000"), 2, "--size"),
    ],
)
def test_a_request_that_no_machine_can_meet_is_named(
    cli: Cli, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ran = cli(*arguments)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert "bug" not in ran.err
    assert "Traceback" not in ran.err
    assert not Path("runs").exists()


def test_what_runs_in_one_process_is_not_started_by_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for processes, code in (("2", 2), ("1", 0)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        ran = cli("inspect", "nets.py:tiny", "--weights", "none")
        assert ran.code == code
        assert ("inspect runs in one process: start it without torchrun" in ran.err) == (code == 2)
