from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli, Ran
from torch import nn

import normswap
from normswap.cli import main

TINY = ("finetune", "nets.py:tiny", "--weights", "none", "--trust-code", "--data", "photos", "--device", "cpu")
SHORT = ("--steps", "3", "--calibrate-images", "4")


def finetune(cli: Cli, *more: str) -> Ran:
    return cli(*TINY, *SHORT, *more)


def weights(folder: str, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return normswap.load(Path(folder) / name, trust_code=True).state_dict()


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("of_its_own", [True, False])
def test_calibrated_is_on_images_like_those_of_the_pretraining_only(cli: Cli, nets: Any, of_its_own: bool) -> None:
    network = nets.tiny()
    normswap.estimate_statistics(network, Path("photos") if of_its_own else 0.1 * torch.randn(8, 3, 20, 20) - 3)
    torch.save(network.state_dict(), "weights.pth")
    ran = cli(*TINY, "--weights", "weights.pth", "--to", "gn", "--groups", "4", "--epochs", "1")
    assert ran.code == 0, ran.err
    told = " ".join(ran.err.split())
    assert ("calibrated on 8 training images" in told) == of_its_own
    assert ("not calibrated: the training images are not what the network was trained on" in told) != of_its_own


@pytest.mark.usefixtures("images")
def test_a_converted_file_is_told_to_be_calibrated_first_and_not_calibrated_in_silence(cli: Cli) -> None:
    assert (
        cli("convert", "nets.py:tiny", "--weights", "none", "--to", "gn", "--groups", "4", "-o", "gn.safetensors").code
        == 0
    )
    call = ("finetune", "gn.safetensors", "--trust-code", "--data", "photos", "--device", "cpu", "--steps", "2")
    ran = cli(*call, "--calibrate", "photos")
    assert ran.code == 2
    assert "normswap calibrate gn.safetensors --data photos" in " ".join(ran.err.split())
    told = "gn.safetensors is as it was converted"
    assert told in " ".join(cli(*call, "-o", "first").err.split())
    assert (
        cli("calibrate", "gn.safetensors", "--data", "photos", "--trust-code", "-o", "repaired.safetensors").code == 0
    )
    assert "as it was converted" not in " ".join(
        cli(*call[:1], "repaired.safetensors", *call[2:], "-o", "second").err.split()
    )


@pytest.mark.usefixtures("images", "pictures")
def test_one_command_converts_calibrates_and_trains(cli: Cli) -> None:
    images = ("--calibrate-images", "8")
    ran = cli(*TINY, "--to", "gn", "--groups", "4", *images, "--epochs", "12", "--lr", "0.01", "--json")
    assert ran.code == 0, ran.err
    report = ran.json
    assert report["output"] == "runs/tiny-gn"
    assert report["steps"] == 12 * 4
    assert report["figures"]["val_loss"] < report["before"]["val_loss"]
    assert "calibrated on 8 training images" in ran.err
    assert "4 of the 12 images are held back" in ran.err
    names = {p.name for p in Path("runs/tiny-gn").iterdir()}
    files = {"best.safetensors", "last.safetensors", "state.pt", "metrics.jsonl", "curves.png", "confusion.png"}
    assert names == {*files, "run.json"}
    history = normswap.load("runs/tiny-gn/last.safetensors", trust_code=True)._normswap.history
    assert [entry.action for entry in history] == ["calibrate", "finetune"]


@pytest.mark.usefixtures("images", "pictures")
def test_the_page_names_figures_and_files(cli: Cli) -> None:
    ran = finetune(cli, "--to", "gn", "--groups", "4")
    assert ran.code == 0, ran.err
    assert "3 steps" in ran.out
    assert "validation accuracy" in ran.out
    assert "training loss" in ran.out
    assert "(before " in ran.out
    assert ", over steps 1 to 3" in ran.out
    assert ", over 4 images at step 3" in ran.out
    assert "best.safetensors, last.safetensors, curves.png, confusion.png" in ran.out


@pytest.mark.usefixtures("images")
def test_the_end_of_a_run_tells_the_worst_classes_and_what_they_are_taken_for(cli: Cli) -> None:
    ran = finetune(cli, "--output", "run", "--report", "page.html")
    assert ran.code == 0, ran.err
    assert "worst classes  images  accuracy" in ran.out
    ran = finetune(cli, "--output", "run", "--force", "--json")
    noted = json.loads(Path("run/run.json").read_text())
    assert noted["options"]["steps"] == 3
    for found in (ran.json, noted["result"]):
        assert {each["name"] for each in found["classes"]} <= set(found["names"])
        assert sum(each["count"] for each in found["classes"]) == ran.json["validation_images"]
        right = sum(count for true, predicted, count in found["confusion"] if true == predicted)
        assert right / ran.json["validation_images"] == ran.json["figures"]["val_accuracy"]
    page = Path("page.html").read_text()
    assert 'aria-label="confusion matrix"' in page
    assert "From the worst to the best" in page


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("lr", "best_at"), [("10", "0"), ("1e-4", "3")])
def test_classes_of_another_network_than_the_best_say_so(cli: Cli, lr: str, best_at: str) -> None:
    ran = finetune(cli, "--lr", lr, "--monitor", "loss")
    assert re.findall(r"best +val loss \S+ at step (\d+)", ran.out) == [best_at]
    assert ("at step 3, not of the best network" in ran.out) == (best_at != "3")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--label-smoothing", "2"), "--label-smoothing must be a share of 1"),
        (("--mixup", "0.2", "--batch-size", "1"), "--mixup mixes the pictures of a batch"),
        (("--checkpoint-every", "5 parsecs"), "--checkpoint-every must be as 500 steps"),
        (("--device", "cuda"), "device 'cuda' cannot be used"),
        (("--distil", "0.5", "--task", "segmentation"), "--distil goes with classification"),
    ],
)
def test_an_option_that_can_never_work_is_refused_before_a_network_is_built(
    cli: Cli, more: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = finetune(cli, "--to", "gn", "--groups", "4", *more)
    assert ran.code == 2, ran.err
    assert words in ran.err
    assert "building" not in ran.err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("images")
def test_a_figure_that_cannot_be_monitored_is_refused_before_anything_takes_time(cli: Cli) -> None:
    ran = finetune(cli, "--to", "gn", "--groups", "4", "--task", "detection", "--monitor", "loss")
    assert ran.code == 2
    assert "--monitor must be one of map, map_50" in ran.err
    assert "building" not in ran.err


@pytest.mark.usefixtures("images")
def test_a_converted_file_goes_on_from_what_it_is(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--weights", "none", "--to", "gn", "--groups", "4").code == 0
    ran = cli("finetune", "tiny-gn.safetensors", "--trust-code", "--data", "photos", "--steps", "2", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["output"] == "runs/tiny-gn"
    verified = cli("verify", "nets.py:tiny", "runs/tiny-gn/last.safetensors", "--weights", "none", "--trust-code")
    assert verified.code == 0, verified.err
    again = cli("finetune", "tiny-gn.safetensors", "--trust-code", "--data", "photos", "--to", "ln")
    assert again.code == 2
    assert "converted already" in again.err


FLAGS = [
    ("--batch-size", "4"),
    ("--accumulate", "2"),
    ("--lr", "0.1"),
    ("--optimizer", "sgd"),
    ("--weight-decay", "0.5", "--lr", "0.1"),
    ("--warmup", "0.9"),
    ("--clip-grad", "0.001", "--optimizer", "sgd"),
    ("--clip-grad", "0"),
    ("--no-stabilize",),
    ("--train", "norm"),
    ("--train", "head"),
    ("--train", "3.*"),
    ("--freeze-affine",),
    ("--distil", "0.5"),
    ("--ema",),
    ("--ema", "--ema-decay", "0.05"),
    ("--label-smoothing", "0.3"),
    ("--mixup", "0.4"),
    ("--cutmix", "1"),
    ("--rand-augment",),
    ("--rand-augment", "3"),
    ("--augment", "none"),
    ("--augment", "flip"),
    ("--size", "12"),
    ("--mean", "0.1", "--std", "0.9"),
    ("--precision", "bf16"),
    ("--seed", "7"),
    ("--calibrate", "none"),
    ("--rule", "1=keep"),
]


@pytest.fixture(scope="module")
def usual() -> dict[str, torch.Tensor]:
    """Filled by the first test below: what the command gives without any of the flags."""
    return {}


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_flag_has_its_effect(cli: Cli, usual: dict[str, torch.Tensor], flags: tuple[str, ...]) -> None:
    more = ("--to", "gn", "--groups", "4", "--output", "run")
    if not usual:
        assert finetune(cli, *more).code == 0
        usual.update(weights("run"))
    ran = finetune(cli, *more, "--force", *flags)
    assert ran.code == 0, ran.err
    found = weights("run")
    assert found.keys() != usual.keys() or any(not torch.equal(found[name], usual[name]) for name in usual)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("flags", [("--workers", "1"), ("--channels-last",), ("--max-bad", "3"), ("--tensorboard",)])
def test_a_flag_of_the_place_leaves_the_result(
    cli: Cli, usual: dict[str, torch.Tensor], flags: tuple[str, ...]
) -> None:
    more = ("--to", "gn", "--groups", "4", "--output", "run")
    if not usual:
        assert finetune(cli, *more).code == 0
        usual.update(weights("run"))
    ran = finetune(cli, *more, "--force", *flags)
    assert ran.code == 0, ran.err
    found = weights("run")
    for name in usual:
        torch.testing.assert_close(found[name], usual[name], rtol=1e-4, atol=1e-5)
    assert Path("run/tensorboard").exists() == ("--tensorboard" in flags)


@pytest.mark.slow
@pytest.mark.usefixtures("images")
def test_a_compiled_network_trains_the_same(cli: Cli) -> None:
    for flags in ((), ("--compile",)):
        assert finetune(cli, "--to", "gn", "--groups", "4", "--output", f"run{len(flags)}", *flags).code == 0
    one, two = weights("run0"), weights("run1")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("images")
def test_a_new_head_is_in_the_file(cli: Cli) -> None:
    ran = finetune(cli, "--to", "gn", "--groups", "4", "--num-classes", "6", "--output", "run")
    assert ran.code == 0, ran.err
    assert weights("run")["7.weight"].shape == (6, 16)


@pytest.mark.usefixtures("images")
def test_frozen_statistics_are_proved(cli: Cli) -> None:
    ran = finetune(cli, "--freeze-stats", "--freeze-affine", "--json")
    assert ran.code == 0, ran.err
    assert any("nothing moved" in note for note in ran.json["notes"])
    assert "batches of 2" not in ran.err


@pytest.mark.usefixtures("images")
def test_batch_norm_at_a_small_batch_is_warned_of(cli: Cli) -> None:
    ran = finetune(cli)
    assert ran.code == 0, ran.err
    assert "2 BatchNorm layers will see batches of 2" in ran.err
    assert "convert to gn or renorm, or --freeze-stats" in ran.err


def test_a_torchvision_data_set_is_taken_by_name(cli: Cli, folder: Path) -> None:
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + os.urandom(28 * 28 * count))
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    fixed = ["finetune", "nets.py:tiny", "--weights", "none", "--to", "gn", "--groups", "4"]
    ran = cli(*fixed, "--data", "torchvision:MNIST", "--data-root", "data", "--steps", "2", "--calibrate-images", "4")
    assert ran.code == 0, ran.err
    missing = cli(*fixed, "--data", "torchvision:CIFAR10", "--steps", "2", "--force")
    assert missing.code == 1
    assert "--download" in missing.err


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--epochs", "1", "--steps", "1"), 2, "exclude each other"),
        (("--optimizer", "adam"), 2, "--optimizer"),
        (("--precision", "fp8"), 2, "--precision"),
        (("--device", "tpu"), 2, "--device"),
        (("--augment", "mixup"), 2, "--augment"),
        (("--groups", "4"), 2, "--to"),
        (("--ema-decay", "0.9"), 2, "goes with --ema"),
        (("--resume", "--force"), 2, "--force"),
        (("--to", "gn", "--groups", "4", "--channels-per-group", "2"), 2, "exclude"),
        (("--freeze-stats", "--to", "gn", "--groups", "4"), 2, "--freeze-affine"),
        (("--output", "photos/run"), 2, "within the data"),
        (("--size", "big"), 2, "--size"),
        (("--resume",), 1, "to resume from"),
        (("--data", "nowhere"), 1, "nowhere"),
        (("--to", "gm"), 2, "gm"),
        (("--to", "gn", "--groups", "3"), 1, "--groups"),
        (("--train", "layer9.*"), 2, "layer9"),
        (("--batch-size", "99"), 1, "--batch-size"),
        (("--precision", "fp16"), 2, "fp16"),
        (("--device", "cuda"), 2, "cuda"),
        (("--num-classes", "2"), 2, "4 classes"),
        (("--task", "detection", "--mixup", "0.2"), 2, "--mixup goes with classification"),
        (("--task", "segmentation", "--rand-augment"), 2, "--rand-augment goes with classification"),
        (("--mixup", "0.2", "--batch-size", "1"), 2, "batches have a single one"),
        (("--rand-augment", "0"), 2, "--rand-augment"),
        (("--track", "neptune"), 2, "'neptune' is not one of tensorboard, wandb, mlflow"),
        (("--patience", "0"), 2, "--patience"),
        (("--monitor", "miou"), 2, "monitor must be"),
        (("--checkpoint-every", "often"), 2, "--checkpoint-every must be as 500 steps"),
        (("--distil", "0.5", "--num-classes", "9"), 2, "--distil"),
        (("--output", "nets.py"), 1, "nets.py"),
    ],
)
def test_a_wrong_call_is_one_clear_message(cli: Cli, flags: tuple[str, ...], code: int, words: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = finetune(cli, *flags)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert "bug" not in ran.err


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    ran = finetune(cli, "--track", "tensorboard", "--track", name)
    assert ran.code == 1
    assert ran.err.endswith(f"error: tracking with {name} needs its package\npip install {name}\n")
    assert "building" not in ran.err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("images")
def test_a_run_is_not_replaced_without_force(cli: Cli) -> None:
    assert finetune(cli, "--output", "run").code == 0
    ran = finetune(cli, "--output", "run")
    assert ran.code == 1
    assert "--resume" in ran.err
    assert "--force" in ran.err


@pytest.mark.usefixtures("images")
def test_unreadable_images_are_named(cli: Cli) -> None:
    Path("photos/red/0.png").write_bytes(b"no picture")
    ran = cli(*TINY, "--epochs", "3", "--calibrate", "none")
    assert ran.code == 0, ran.err
    assert "skipped: photos/red/0.png" in ran.out
    ran = cli(*TINY, "--epochs", "3", "--max-bad", "0", "--force")
    assert ran.code == 1
    assert "red/0.png" in ran.err


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_saves_and_goes_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    call = [*TINY, "--epochs", "3", "--to", "gn", "--groups", "4", "--output", "run"]
    monkeypatch.setattr(sys, "argv", ["normswap", *call])
    with signalled(number, at=6), pytest.raises(SystemExit) as end:
        main()
    printed = "".join(capsys.readouterr())
    assert end.value.code == code, printed
    assert "--resume" in printed
    assert torch.load("run/state.pt", weights_only=True)["step"] == 6
    resumed = cli(*call, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert (resumed.json["resumed_at"], resumed.json["steps"]) == (6, 12)


@contextmanager
def signalled(number: int, *, at: int) -> Iterator[None]:
    """This process gets a signal in the n-th step of training; afterwards it handles signals as before."""
    steps: list[nn.Module] = []

    def count(module: nn.Module, *_: object) -> None:
        if module.training and isinstance(module, nn.Linear):
            steps.append(module)
            if len(steps) == at:
                signal.raise_signal(number)

    before = {
        each: signal.getsignal(each)
        for each in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    }
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
@pytest.mark.usefixtures("images")
def test_a_closed_terminal_stops_a_run_that_saves_first(folder: Path) -> None:
    import fcntl
    import termios

    ours, theirs = os.openpty()
    call = [sys.executable, "-m", "normswap", *TINY, "--epochs", "500", "--to", "gn", "--groups", "4", "-o", "run"]
    process = subprocess.Popen(
        call, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)  # or it waits for us to read
        time.sleep(0.02)
    before = (folder / "run" / "state.pt").stat().st_mtime_ns
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert (folder / "run" / "state.pt").stat().st_mtime_ns > before
    assert not list((folder / "run").glob(".*"))


@pytest.mark.usefixtures("images")
def test_going_on_needs_the_command_it_began_with(cli: Cli) -> None:
    more = ("--to", "gn", "--groups", "4", "--output", "run")
    assert finetune(cli, *more).code == 0
    for other, words in (
        (("--groups", "2"), "groups 4 (now 2)"),
        (("--size", "10"), "size none (now [10, 10])"),
        (("--augment", "none"), "augment"),
        (("--freeze-affine",), "frozen"),
        (("--monitor", "loss"), "no --monitor (now 'loss')"),
    ):
        ran = finetune(cli, *more, "--resume", *other)
        assert ran.code == 2, ran.err
        assert words in ran.err
    again = finetune(cli, *more, "--resume")
    assert again.code == 0, again.err
    assert "the run was complete" in again.out


@pytest.mark.usefixtures("images")
def test_a_run_that_is_to_be_longer_is_told_in_epochs_and_how_to_go_on(cli: Cli) -> None:
    more = ("--calibrate", "none", "--output", "run")
    assert cli(*TINY, *more, "--epochs", "1").code == 0
    ran = cli(*TINY, *more, "--epochs", "2", "--resume")
    assert ran.code == 2
    assert "a run of 1 epoch (4 steps), which cannot become one of 2 epochs (8 steps)" in ran.err
    assert "--epochs 1" in ran.err
    assert "run/last.safetensors" in ran.err
    ran = cli(*TINY, *more, "--steps", "3", "--resume")
    assert "which cannot become one of 3 steps" in ran.err
    assert cli(*TINY, *more, "--epochs", "1", "--resume").code == 0
    longer = ("finetune", "run/last.safetensors", "--trust-code", "--data", "photos", "--epochs", "1", "--output", "on")
    ran = cli(*longer, "--device", "cpu", "--json")
    assert (ran.code, ran.json["steps"]) == (0, 4), ran.err


@pytest.mark.usefixtures("images")
def test_what_was_asked_is_written_down_with_what_was_left_to_the_defaults(cli: Cli) -> None:
    ran = cli(*TINY, "--calibrate", "none", "--output", "run", "--epochs", "1", "--batch-size", "4", "--json")
    assert ran.code == 0, ran.err
    options = json.loads(Path("run/run.json").read_text())["options"]
    wanted = {"data": "photos", "batch_size": 4, "epochs": 1, "steps": None, "seed": 0, "optimizer": "adamw"}
    assert {name: options[name] for name in wanted} == wanted
    assert options["lr"] == ran.json["lr"]


@pytest.mark.usefixtures("images")
def test_a_failed_start_leaves_no_folder(cli: Cli) -> None:
    assert finetune(cli, "--to", "gn", "--groups", "3", "--output", "run").code == 1
    assert not Path("run").exists()


def test_stand_ins_calibrate_before_training(cli: Cli, images: Path) -> None:
    images.rename("train")
    real = ("finetune", "nets.py:real", "--weights", "none", "--trust-code", "--data", "train", "--device", "cpu")
    said = ("--size", "16", "--mean", "0", "--std", "1", "--to", "gn", "--groups", "4", "--steps", "1")
    ran = cli(*real, *said, "--calibrate", "photos", "--calibrate-images", "13")
    assert ran.code == 0, ran.err
    assert "calibrated on 13 crops of photographs 3x16x16" in " ".join(ran.err.split())


@pytest.mark.usefixtures("images")
def test_a_run_goes_on_whose_code_lies_beside_the_file_that_it_began_with(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--weights", "none", "--to", "gn", "-o", "gn.safetensors").code == 0
    Path("elsewhere").mkdir()
    for name in ("nets.py", "gn.safetensors"):
        Path(name).rename(Path("elsewhere", name))
    call = ("finetune", "elsewhere/gn.safetensors", "--trust-code", *TINY[5:], "--steps", "2", "-o", "run")
    for more in ((), ("--resume",)):
        ran = cli(*call, *more)
        assert ran.code == 0, ran.err
    assert "the run was complete" in ran.out


@pytest.mark.usefixtures("images")
def test_a_run_goes_on_with_its_code_elsewhere_and_not_with_another_network(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--weights", "none", "--to", "gn", "-o", "gn.safetensors").code == 0
    call = ("finetune", "gn.safetensors", "--trust-code", *TINY[5:], "--steps", "2", "-o", "run")
    assert (began := cli(*call)).code == 0, began.err
    Path("elsewhere").mkdir()
    Path("nets.py").rename("elsewhere/moved.py")
    ran = cli(*call, "--resume", "--source", "elsewhere/moved.py:tiny")
    assert ran.code == 0, ran.err
    assert "the run was complete" in ran.out
    Path("elsewhere/body.py").write_text("from moved import tiny\ndef body():\n    return tiny()[:5]\n")
    for other in ("moved.py:deep", "body.py:body"):  # the latter without the layer that got a new number of classes
        ran = cli(*call, "--resume", "--source", f"elsewhere/{other}")
        assert ran.code == 1
        assert f"elsewhere/{other} builds another network than the run in run began with:\n  " in ran.err
    ran = cli(*call, "--resume", "--source", "elsewhere/moved.py:tiny", "--arg", "width=8")
    assert ran.code == 2
    assert "run is a run with source" in ran.err


@pytest.mark.usefixtures("images")
def test_a_run_that_converted_its_network_goes_on_with_its_code_elsewhere(cli: Cli) -> None:
    more = ("--trust-code", *TINY[5:], "--to", "gn", "--calibrate", "none", "--steps", "2", "-o", "run")
    assert (began := cli("finetune", "nets.py:tiny", *more)).code == 0, began.err
    Path("elsewhere").mkdir()
    Path("nets.py").rename("elsewhere/moved.py")
    ran = cli("finetune", "elsewhere/moved.py:tiny", *more, "--resume")
    assert ran.code == 0, ran.err
    assert "the run was complete" in ran.out
    ran = cli("finetune", "elsewhere/moved.py:deep", *more, "--resume")
    assert ran.code == 1
    assert "elsewhere/moved.py:deep builds another network than the run in run began with:" in ran.err


@pytest.mark.usefixtures("images")
def test_of_settings_that_differ_those_are_named_that_others_do_not_follow_from(cli: Cli) -> None:
    call = (*TINY, "--calibrate", "none", "--epochs", "2", "--output", "run")
    assert cli(*call).code == 0
    ran = cli(*call, "--resume", "--batch-size", "1")
    assert ran.code == 2
    assert "is the state of a run with --batch-size 2 (now 1)\n" in ran.err
    file = Path("run/state.pt")
    state = torch.load(file, weights_only=True)
    state["settings"] |= {"processes": 2, "steps": state["settings"]["steps"] // 2, "lr": 1e-5}
    torch.save(state, file)
    ran = cli(*call, "--resume")
    assert ran.code == 2
    assert "is the state of a run with processes: 2 (now 1)\n" in ran.err
    assert "Resume with torchrun and 2 processes, on one node or several." in ran.err
    assert "run/last.safetensors, in another --output." in ran.err
    assert "--lr" not in ran.err
