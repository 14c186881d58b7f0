"""What only a process of its own shows: imports at start-up, signals, limits, closed pipes."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import normswap
from normswap.cli.recipe_catalog import recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
NORMSWAP = [sys.executable, "-m", "normswap"]

# A factory that stops halfway through writing the result, and says so on stderr.
STUCK = """
import sys, time
import safetensors.torch
from nets import tiny


def stuck(tensors, path, metadata=None):
    open(path, "wb").write(b"half of it")
    print("WRITING", file=sys.stderr, flush=True)
    time.sleep(60)


def build():
    safetensors.torch.save_file = stuck
    return tiny()
"""


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".py" and p.name != "__pycache__")


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "-h"], ["evaluate", "-h"], ["--version"], ["convert"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from normswap.cli import main\n"
        f"sys.argv = ['normswap', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'torchvision', 'jinja2', 'normswap.cli.terminal.render'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    ran = run(sys.executable, "-c", code)
    assert "HEAVY []" in ran.stdout
    assert ran.returncode == (2 if arguments == ["convert"] else 0)


def test_the_module_runs_and_says_its_version() -> None:
    ran = run(*NORMSWAP, "--version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"normswap {normswap.__version__}\n", "")


def test_the_help_lists_the_commands_under_the_name_normswap() -> None:
    ran = run(*NORMSWAP, "-h")
    assert ran.stdout.startswith("Usage: normswap ")
    assert all(f"\n  {name} " in ran.stdout for name in ("inspect", "convert", "verify", "norms"))


@contextmanager
def stuck(folder: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    """A conversion that has written half of its result."""
    (folder / "stuck.py").write_text(STUCK)
    command = [*prefix, *NORMSWAP, "convert", "stuck.py:build", "--to", "ln", "--no-check"]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and what they start, ignore it

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        timer = threading.Timer(300, process.kill)  # else a pipe is read for ever
        timer.start()
        try:
            assert process.stderr is not None
            assert any("WRITING" in line for line in process.stderr)
            yield process
        finally:
            timer.cancel()
            process.kill()


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was written"),
        pytest.param(getattr(signal, "SIGHUP", 0), 129, "", id="SIGHUP"),
    ],
)
def test_an_interrupted_run_leaves_nothing_behind(folder: Path, number: int, code: int, said: str) -> None:
    with stuck(folder) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "")
    assert err.strip() == said
    assert files(folder) == []


def test_under_nohup_a_run_outlives_its_terminal_and_leaves_nothing_behind_when_ended(folder: Path) -> None:
    with stuck(folder, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (143, "", "")
    assert files(folder) == []


@pytest.mark.parametrize("module", ["typer", "normswap.cli.commands.convert"])
def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback(module: str) -> None:
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from importlib.metadata import EntryPoint\n"
        f"EntryPoint('normswap', {entry_point()!r}, 'console_scripts').load()()\n"
    )
    ran = run(sys.executable, "-c", code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted; nothing was written\n")


def entry_point() -> str:
    """What the installed command runs, as pyproject.toml says."""
    text = (Path(normswap.__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    return re.findall(r'(?m)^\[project.scripts\]\nnormswap = "(.+)"$', text)[0]


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stdout_is_no_error(folder: Path, closed: str) -> None:
    """And what goes to it lands in no file that the command opens under the same number."""
    ran = run("sh", "-c", f"{sys.executable} -m normswap recipes train_digits --output copied.py {closed}")
    assert (ran.returncode, "bug" in ran.stderr) == (0, False), ran.stderr
    assert (folder / "copied.py").read_bytes() == recipe("train_digits").file.read_bytes()


def test_a_conversion_with_no_stream_at_all_writes_a_whole_file(folder: Path) -> None:
    command = f"{sys.executable} -m normswap convert nets.py:tiny --weights none --to ln --no-check <&- >&- 2>&-"
    assert run("sh", "-c", command).returncode == 0
    assert normswap.load(folder / "tiny-ln.safetensors", trust_code=True)[0].weight.shape[0] == 8


def test_a_full_disk_leaves_nothing_behind(folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*NORMSWAP, "convert", "nets.py:tiny", "--to", "ln", "--no-check"]
    ran = run(*command, preexec_fn=limit, env=environment)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "error: tiny-ln.safetensors cannot be written" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert files(folder) == []


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([*NORMSWAP, "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_stdout_that_takes_nothing_is_an_error(flag: str) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run([*NORMSWAP, flag], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: No space left on device")
    assert "Traceback" not in ran.stderr
