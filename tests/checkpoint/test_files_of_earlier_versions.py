"""Files that an earlier version wrote still load, compute what they computed then, and lead back to their original."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap.planning.plan import Plan

FOLDER = Path(__file__).parent / "written_by_0_1"
FILES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.safetensors"))
TRAINED = {"distilled", "cut/best", "cut/last", "head/last"}


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    from nets import residual

    del sys.modules["nets"]  # others have files of that name
    return residual()


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / "outputs.pt", weights_only=True)


def inputs() -> torch.Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FILES)
def test_a_file_computes_what_it_computed_when_it_was_written(
    name: str, original: nn.Module, outputs: dict[str, torch.Tensor]
) -> None:
    if name == "twice":  # a file leads back one conversion
        original = normswap.convert(original, "gn", groups=2, example_inputs=inputs()[:2])
    model = normswap.load(FOLDER / f"{name}.safetensors", model=original)
    with torch.no_grad():
        now = model.eval()(inputs()[:4])
    assert now.isfinite().all()
    if name in outputs:
        assert torch.allclose(now, outputs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*FILES} - TRAINED - {"without-undo", "twice"}))
def test_a_file_leads_back_to_the_original_bit_for_bit(name: str, original: nn.Module) -> None:
    before = {key: value.clone() for key, value in original.state_dict().items()}
    reverted = normswap.revert(normswap.load(FOLDER / f"{name}.safetensors", model=original))
    after = reverted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_plan_reads_as_the_plan_that_is_made_today(original: nn.Module) -> None:
    plan = Plan.from_json((FOLDER / "plan.json").read_text("utf-8"))
    today = normswap.plan(original, "gn", groups=2, example_inputs=inputs()[:2])
    assert [(s.path, s.target, s.transfer, s.producers) for s in plan.steps] == [
        (s.path, s.target, s.transfer, s.producers) for s in today.steps
    ]
    with torch.no_grad():
        converted = normswap.convert(original, using=plan)
    assert normswap.revert(converted) is not None
