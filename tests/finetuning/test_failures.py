"""What goes wrong in the middle of a run, for every task: nothing is lost, and the message says what is left."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import shapes_folder
from test_detection_task import grouped
from test_segmentation_task import pixels
from torch import Tensor, nn

import normswap
from normswap.errors import Interrupted, TrainingError
from normswap.finetuning.engine.failures import explain
from normswap.finetuning.output.report import Progress

TASKS = ("classification", "detection", "segmentation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"), 64, held_out=2)


class Spoilt(nn.Module):
    """A network that does something at the n-th forward pass in train mode, or at the n-th in eval mode."""

    def __init__(self, network: nn.Module, act: Any, *, step: int = 0, validation: int = 0) -> None:
        super().__init__()
        self.network, self.act, self.at = network, act, {True: step, False: validation}
        self.roi_heads = getattr(network, "roi_heads", None)

    def forward(self, *args: Any) -> Any:
        self.at[self.training] -= 1
        output = self.network(*args)
        return self.act(output) if self.at[self.training] == 0 else output


def infinite(output: Any) -> Any:
    return {k: v * math.inf for k, v in output.items()} if isinstance(output, dict) else output * math.inf


def hungry(output: Any) -> Any:
    return torch.empty(2**58)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def run(task: str, folder: Path, output: Path | None, act: Any = None, **more: Any) -> nn.Module:
    """The network, after the run; the exception that the run ended with is the caller's to catch."""
    at = {name: more.pop(name) for name in ("step", "validation") if name in more}
    network = {"classification": classifier, "detection": grouped, "segmentation": pixels}[task]()
    model = Spoilt(network, act, **at)
    data: tuple[Any, Any] = (folder / "train", folder / "val")
    if task == "classification":
        x, y = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
        data = ((x, y), (x, y))
    settings = {"task": task, "device": "cpu", "epochs": 1, "batch_size": 2, "lr": 1e-3, **more}
    normswap.finetune(model, *data, output=output, **settings)
    return model


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(task: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (inf|nan) at step 3; the last good checkpoint is .*step 0"):
        run(task, folder, tmp_path / "run", infinite, step=3)
    assert state(tmp_path / "run")["step"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_memory_that_runs_out_saves_the_steps_before(task: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 3 does not fit into the memory of cpu; .*of step 2") as error:
        run(task, folder, tmp_path / "run", hungry, step=3)
    assert "batch_size" in str(error.value)
    assert state(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("task", TASKS)
def test_memory_that_runs_out_in_the_first_validation_is_told_too(task: str, folder: Path, tmp_path: Path) -> None:
    def act(output: Any) -> Any:
        return output if isinstance(output, Tensor) and len(output) == 1 else hungry(output)  # a look for the head

    with pytest.raises(TrainingError, match="validation does not fit into the memory of cpu; nothing has changed yet"):
        run(task, folder, tmp_path / "run", act, validation=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("task", TASKS)
def test_a_signal_saves_the_state_and_the_run_goes_on(
    task: str, number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normswap.finetuning.engine.reporter.BETWEEN", -1.0)
    heard: list[int] = []

    def tell(progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run(task, folder, tmp_path / "cut", progress=tell)
    except Interrupted:
        heard.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [number]
    assert state(tmp_path / "cut")["step"] == 2
    cut = run(task, folder, tmp_path / "cut", resume=True)
    whole = run(task, folder, tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(_tensors(cut), _tensors(whole), strict=True))


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def test_a_network_that_does_not_compile_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(RuntimeError):
        """Raised as torch's own compiler raises it: at the first call."""

    Failed.__module__ = "torch._dynamo.exc"

    def compiled(forward: Any) -> Any:
        def call(*args: Any) -> Any:
            raise Failed("no C++ compiler\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(TrainingError, match=r"torch.compile .*no C\+\+ compiler\)\nLeave compile"):
        normswap.finetune(model, data, batch_size=2, steps=1, device="cpu", compile=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failing_torch_compile_is_no_fault_of_ours_and_names_the_option() -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    error = explain(InternalTorchDynamoError("no C++ compiler"), "step 1", torch.device("cpu"), "nothing is left")
    assert isinstance(error, TrainingError)
    assert error.message == "torch.compile cannot compile the network, at step 1; nothing is left (no C++ compiler)"
    assert error.hint == "Leave compile out."


@pytest.mark.parametrize("said", ["[gloo] Connection closed by peer [127.0.0.1]:1", "Connection reset by peer"])
def test_the_end_of_another_process_is_told_with_what_is_left(said: str) -> None:
    error = explain(
        RuntimeError(said), "step 7", torch.device("cpu"), "the last good checkpoint is state.pt, of step 3"
    )
    assert isinstance(error, TrainingError)
    assert error.message == "another process has ended, at step 7; the last good checkpoint is state.pt, of step 3"
    assert "its own node" in error.hint
