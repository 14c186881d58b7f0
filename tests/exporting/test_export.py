"""`normswap.export`: files that other runtimes run, with the network's outputs, or none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import build
from helpers import conv_bn, fingerprint, randomized, relative
from torch import Tensor, nn

import normswap
from normswap.errors import DataError, NetworkError, OptionError, OutputError, SelfCheckError, first_line

pytestmark = pytest.mark.filterwarnings("ignore")  # of onnxscript and onnx at import
SUFFIX = {"onnx": ".onnx", "torchscript": ".pt", "exported": ".pt2"}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(conv_bn(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return normswap.convert(randomized(net), "gn", groups=2).eval()


def ran(path: Path, to: str, x: Tensor) -> Tensor:
    """What the runtime itself makes of the file."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    if to == "torchscript":
        return torch.jit.load(str(path))(x)
    return torch.export.load(str(path)).module()(x)


@pytest.mark.parametrize("to", SUFFIX)
def test_the_runtime_gives_the_networks_outputs_for_any_batch(tmp_path: Path, to: Any) -> None:
    model = network().train()
    before = fingerprint(model)
    report = normswap.export(model, tmp_path / f"net{SUFFIX[to]}", to=to, example_inputs=torch.randn(1, 3, 12, 10))
    assert fingerprint(model) == before
    assert (report.dynamic, report.batches, report.inputs) == (True, (2, 3), "Nx3x12x10")
    x = torch.randn(5, 3, 12, 10)
    with torch.no_grad():
        assert relative(model.eval()(x), ran(report.path, to, x)) < 1e-5
    assert report.error < 1e-5


def test_a_group_norm_is_one_operator(tmp_path: Path) -> None:
    import onnx

    report = normswap.export(network(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 8, 8))
    graph = onnx.load(report.path).graph
    assert Counter(node.op_type for node in graph.node)["GroupNormalization"] == 2
    assert (report.opset, report.operators) == (21, {"GroupNormalization": 2})


def test_an_older_opset_is_taken_on_request(tmp_path: Path) -> None:
    import onnx

    report = normswap.export(network(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 8, 8), opset=18)
    assert onnx.load(report.path).opset_import[0].version == 18
    assert report.operators == {"InstanceNormalization": 2}


class Fixed(nn.Module):
    """Takes batches of one size: that of the first it has seen in a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        count = int(x.shape[0])
        return self.conv(x).reshape(int(torch.tensor(count)), -1)


def test_a_batch_that_the_code_fixes_is_told(tmp_path: Path) -> None:
    report = normswap.export(Fixed(), tmp_path / "net.pt", to="torchscript", example_inputs=torch.randn(2, 3, 4, 4))
    assert (report.dynamic, report.batches, report.inputs) == (False, (2,), "2x3x4x4")
    assert "the batch is fixed to 2" in report.notes[0]


class Drawn(nn.Module):
    """Gives other values each time, which no file repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand_like(x)


@pytest.mark.parametrize("to", SUFFIX)
def test_a_file_with_other_outputs_is_not_kept(tmp_path: Path, to: Any) -> None:
    with pytest.raises(SelfCheckError, match="outputs differ from the network's by"):
        normswap.export(Drawn(), tmp_path / f"net{SUFFIX[to]}", to=to, example_inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_several_inputs_and_outputs_are_compared(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.linear(x + y), "number": x.argmax(1), "x": self.linear(x)}

    given = (torch.randn(2, 4), torch.randn(2, 4))
    for to, suffix in SUFFIX.items():
        report = normswap.export(Two(), tmp_path / f"net{suffix}", to=to, example_inputs=given)  # type: ignore[arg-type]
        assert report.inputs == "Nx4, Nx4"


def test_what_cannot_be_exported_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="FasterRCNN does not take tensors alone"):
        normswap.export(build("fasterrcnn_mobilenet_v3_large_320_fpn"), tmp_path / "net.onnx")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(NetworkError, match="Branching cannot be exported"):
        normswap.export(Branching(), tmp_path / "net.pt2", to="exported", example_inputs=torch.ones(2, 2))
    with pytest.raises(DataError, match="no input is known"):
        normswap.export(Branching(), tmp_path / "net.pt2", to="exported")
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(OutputError, match="not a name for onnx"):
        normswap.export(network(), tmp_path / "net.pt", example_inputs=x)
    with pytest.raises(OptionError, match="opset goes with onnx"):
        normswap.export(network(), tmp_path / "net.pt", to="torchscript", opset=20, example_inputs=x)
    with pytest.raises(OptionError, match="to"):
        normswap.export(network(), tmp_path / "net.tflite", to="tflite", example_inputs=x)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "torchscript", "exported"])
def test_inputs_that_the_network_does_not_take_are_told_before_any_exporter_speaks(
    tmp_path: Path, to: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    suffix = {"onnx": "onnx", "torchscript": "pt", "exported": "pt2"}[to]
    with pytest.raises(DataError, match=r"does not run on 1,1,8,8 \(RuntimeError: .*3 channels, but got 1") as error:
        normswap.export(network(), tmp_path / f"net.{suffix}", to=to, example_inputs=torch.randn(1, 1, 8, 8))
    assert "example_inputs" in str(error.value.hint)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_quoted_error_has_no_colours() -> None:
    assert first_line(ValueError("\x1b[96mThis is step 1/3\x1b[0m of\nmore")) == "This is step 1/3 of"


def test_a_file_that_exists_stays_unless_told_otherwise(tmp_path: Path) -> None:
    place, x = tmp_path / "net.pt2", torch.randn(2, 3, 8, 8)
    place.write_bytes(b"older")
    with pytest.raises(OutputError, match="exists already"):
        normswap.export(network(), place, to="exported", example_inputs=x)
    assert place.read_bytes() == b"older"
    normswap.export(network(), place, to="exported", example_inputs=x, overwrite=True)
    assert place.read_bytes() != b"older"


def test_without_onnx_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(normswap.NormswapError, match=r"onnxscript is not installed\npip install 'normswap\[onnx\]'"):
        normswap.export(network(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 8, 8))
