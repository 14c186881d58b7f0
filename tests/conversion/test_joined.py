"""A network that was converted, trained, and then fused on images: one file that its source builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomized, relative, run
from torch import Tensor, nn

import normswap
from normswap.conversion.history import FineTuned
from normswap.conversion.joined import joined
from normswap.conversion.record import record_of
from normswap.errors import RevertError


class Net(nn.Module):
    """A norm behind a convolution, and one that reads a sum, which is prescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.again, self.last, self.head = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.last(x + self.again(x))).mean((2, 3), keepdim=True)).flatten(1)


X = torch.randn(24, 3, 8, 8)


def trained(to: str = "gn") -> nn.Module:
    made = normswap.convert(randomized(Net()).eval(), to, **({"groups": 2} if to == "gn" else {}))
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def fused(made: nn.Module, to: str = "fused") -> nn.Module:
    flat = normswap.convert(made, to, missing_statistics="later", example_inputs=X[:2])
    normswap.calibrate(flat, made, X, progress=False)
    return flat


def test_one_record_builds_from_the_first_original_what_both_made(tmp_path: Path) -> None:
    flat = fused(trained())
    before = run(flat, X)
    assert joined(flat)
    assert relative(before, run(flat, X)) < 1e-5
    assert [(s.path, s.source, s.target, s.transfer) for s in record_of(flat).plan.steps] == [
        ("norm", "bn", "fused", "fuse"),
        ("last", "bn", "fused", "affine"),
    ]
    normswap.save(flat, tmp_path / "flat.safetensors")
    loaded = normswap.load(tmp_path / "flat.safetensors", model=Net())
    assert torch.equal(run(loaded, X), run(flat, X))
    assert not [m for m in loaded.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    record_of(loaded).history.insert(0, FineTuned())  # as the finetune that `trained` stands for
    with pytest.raises(RevertError, match="the network was trained before it was fused"):
        normswap.revert(loaded)


@pytest.mark.parametrize("to", ["bn", "frozen"])
def test_other_ways_stay_two_conversions(to: str) -> None:
    flat = fused(trained(), to)
    previous = record_of(flat).previous
    assert not joined(flat)
    assert record_of(flat).previous is previous


def test_a_network_that_was_converted_once_stays_as_it_is() -> None:
    made = trained()
    record = record_of(made)
    assert not joined(made)
    assert record_of(made) is record
    assert not joined(Net())


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
"""


def test_a_fused_network_that_was_trained_later_only_lacks_what_undoes_it() -> None:
    made = normswap.convert(randomized(Net()).eval(), "fused", undo=False)
    record_of(made).history.append(FineTuned())
    with pytest.raises(RevertError, match="kept nothing to undo it with"):
        normswap.revert(made)


def test_the_command_line_fuses_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from PIL import Image

    from normswap.cli import app

    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(SOURCE)
    for kind in ("one", "two"):
        Path("photos", kind).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(Path("photos", kind, f"{i}.png"))

    def command(*words: str, quiet: str = "--quiet", code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            app([*words, quiet] if quiet else [*words])
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return " ".join(f"{said.out} {said.err}".split())

    size = ("--size", "16")
    command("convert", "nets.py:Net", "--to", "gn", "--groups", "2", "-o", "gn.safetensors", "--calibrate", "none")
    command("finetune", "gn.safetensors", "--trust-code", "--data", "photos", *size, "--steps", "2", "--output", "run")
    best = "run/best.safetensors"
    fusing = (best, "--trust-code", "--to", "fused", "--calibrate", "photos", *size, "-o", "f.safetensors")
    said = command("convert", *fusing, quiet="")
    assert "1 layer: 1 gn to fused" in said
    assert "norm 1 8 GroupNorm fused" in said
    assert f"{best} was trained since its conversion, and is fused as it is now; the result cannot be undone" in said
    assert f"Next: normswap verify {best} f.safetensors --trust-code" in said
    compared = command("verify", best, "f.safetensors", "--trust-code", "--data", "photos", *size, quiet="")
    assert f"A {best} B f.safetensors" in compared
    refused = command("convert", "f.safetensors", "--to", "original", "--trust-code", quiet="", code=1)
    assert "trained before it was fused" in refused
    assert "no-undo" not in refused
    loaded = normswap.load("f.safetensors", trust_code=True)
    assert isinstance(loaded.norm, nn.Identity)
    x = torch.randn(4, 3, 16, 16)
    assert relative(run(normswap.load(best, trust_code=True), x), run(loaded, x)) < 0.5
