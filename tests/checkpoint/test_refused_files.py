"""Files that are not loaded: of other networks, of others, not sound."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import Small, flags, small, written
from helpers import contents, randomized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.checkpoint.manifest import digest, is_ours
from normswap.checkpoint.saving import load, save
from normswap.conversion.record import record_of
from normswap.errors import CheckpointError, NormswapError, OptionError, WeightsError


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> Path:
    """Change the manifest of a file; seal=True gives it the checksum of what it then says."""
    with safe_open(file, framework="pt") as opened:
        manifest = json.loads(opened.metadata()["normswap"])
    changed = change(manifest)
    manifest = manifest if changed is None else changed
    if seal:
        manifest["sha256"] = digest(manifest)
    save_file(load_file(file), file, metadata={"normswap": json.dumps(manifest)})
    return file


def failure(file: Path, kind: type[NormswapError] = CheckpointError, **kwargs: Any) -> NormswapError:
    with pytest.raises(kind) as caught:
        load(file, **kwargs)
    return caught.value


# --- whose file it is ---------------------------------------------------------------------------------------------


def test_a_file_of_an_own_architecture_needs_it_and_says_so(tmp_path: Path) -> None:
    error = failure(written(tmp_path))
    assert error.message == f"{tmp_path / 'a.safetensors'} does not know how to build its architecture"
    assert f'normswap.load("{tmp_path / "a.safetensors"}", model=my_model)' in error.hint
    assert 'source="FILE.py:FACTORY" says what makes the original network' in error.hint


NETS = """
import pathlib
from torch import nn
pathlib.Path({marker!r}).touch()
def build(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
"""


def test_code_that_a_manifest_names_is_run_only_for_those_who_trust_it(tmp_path: Path) -> None:
    from normswap.sources.spec import Source

    marker, script = tmp_path / "ran", tmp_path / "nets.py"
    script.write_text(NETS.format(marker=str(marker)))
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)))
    converted = normswap.convert(model, "gn", groups=2)
    record_of(converted).source = Source("file", f"{script}:build").to_dict()
    file = save(converted, tmp_path / "a.safetensors")
    error = failure(file)
    assert f"{script}:build" in error.message
    assert "trust_code=True" in error.hint
    assert not marker.exists()
    assert contents(load(file, model=copy.deepcopy(model))) == contents(converted)
    assert not marker.exists()
    assert contents(load(file, trust_code=True)) == contents(converted)
    assert marker.exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: small(width=16), "channels"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "4"),
        (lambda: nn.Sequential(*list(small())[:4], nn.GroupNorm(2, 8)), "GroupNorm"),
        (lambda: normswap.convert(small(), "ln"), "GroupNorm"),
        (lambda: nn.Linear(2, 2), "does not fit Linear"),
        (lambda: nn.Sequential(*small(), nn.Linear(2, 2)), "5.weight"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 5, bias=False), *list(small())[1:]), "(8, 3, 5, 5) in the model"),
    ],
)
def test_another_architecture_is_refused_and_left_as_it_was(
    tmp_path: Path, other: Callable[[], nn.Module], said: str
) -> None:
    file = written(tmp_path)
    model = other()
    before = contents(model), repr(model), [id(m) for m in model.modules()], flags(model)
    error = failure(file, WeightsError, model=model)
    assert f"{file} does not fit {type(model).__name__}" in error.message
    assert said in error.message
    assert (contents(model), repr(model), [id(m) for m in model.modules()], flags(model)) == before


def test_a_network_that_was_not_converted_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match="only a network from"):
        save(small(), tmp_path / "a.safetensors")
    with pytest.raises(NormswapError, match=r"0\.weight is on the meta device"):
        save(normswap.convert(small().to("meta"), "gn"), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(Small):
        def get_extra_state(self) -> Any:
            return {"step": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(NormswapError, match="_extra_state is a dict, and safetensors holds tensors only"):
        save(normswap.convert(randomized(Stateful()), "gn"), tmp_path / "a.safetensors")


# --- what is not ours, or not sound -------------------------------------------------------------------------------


def test_a_plain_safetensors_file_is_not_ours_and_the_way_to_use_it_is_named(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "a.safetensors")
    error = failure(tmp_path / "a.safetensors")
    assert "was not written by normswap" in error.message
    assert f"--weights {tmp_path / 'a.safetensors'}" in error.hint
    assert not is_ours(tmp_path / "a.safetensors")
    assert is_ours(written(tmp_path))
    assert not is_ours(tmp_path)
    assert not is_ours(tmp_path / "no")


def test_nothing_a_folder_and_damaged_files_are_told_apart(tmp_path: Path) -> None:
    assert failure(tmp_path / "no.safetensors").message.endswith("no.safetensors does not exist")
    assert failure(tmp_path).message == f"{tmp_path} is a folder, not a file"
    data = written(tmp_path).read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        assert "cut.safetensors is not a complete safetensors file" in failure(tmp_path / "cut.safetensors").message
    torch.save(small().state_dict(), tmp_path / "a.pth")
    assert "a.pth is not a complete safetensors file" in failure(tmp_path / "a.pth").message


def test_a_file_of_a_newer_format_names_the_upgrade(tmp_path: Path) -> None:
    error = failure(rewrite(written(tmp_path), lambda m: m.update(format=2, something="new")))
    assert "has format 2, this normswap" in error.message
    assert error.hint == "install a newer normswap"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["plan"]["steps"][0].update(channels=4),
        lambda m: m.update(source={"kind": "file", "name": "/tmp/evil.py:run", "args": {}}),
        lambda m: m.update(extra=1),
        lambda m: m["ties"].update(a="b"),
    ],
)
def test_an_edited_manifest_is_not_used(tmp_path: Path, change: Any) -> None:
    error = failure(rewrite(written(tmp_path), change), model=small())
    assert "was edited after normswap wrote it" in error.message


@pytest.mark.parametrize("manifest", [[], 3, None, "text", {}, {"format": 1}, {"format": "one", "sha256": "x"}])
def test_a_manifest_that_is_none_is_one_clear_error(tmp_path: Path, manifest: Any) -> None:
    file = tmp_path / "a.safetensors"
    save_file(small().state_dict(), file, metadata={"normswap": json.dumps(manifest)})
    assert f"the manifest of {file} " in failure(file, model=small()).message


def test_a_manifest_that_is_no_json_is_one_clear_error(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "a.safetensors", metadata={"normswap": '{"format": 1,'})
    assert "is damaged: JSONDecodeError" in failure(tmp_path / "a.safetensors").message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(plan={"steps": 3}), "not a normswap plan"),
        (lambda m: m.update(plan=None), "not a normswap plan"),
        (lambda m: m.update(plan=[]), "not a normswap plan"),
        (lambda m: m["plan"]["steps"][0].update(target="nonesuch"), "not a normswap plan"),
        (lambda m: m["plan"]["steps"][0].update(path="7"), "7: there is no such layer"),
        (lambda m: m["plan"]["steps"][0].pop("channels"), "not a normswap plan"),
        (lambda m: m.pop("plan"), "is damaged"),
        (lambda m: m.pop("undo"), "is damaged"),
        (lambda m: m.update(check={"nothing": 1}), "is damaged"),
        (lambda m: m.update(ties={"0.weight": "nothing"}), "is damaged"),
        (lambda m: m["undo"]["layers"].append("9"), "is damaged"),
    ],
)
def test_a_sealed_manifest_of_the_wrong_form_is_one_clear_error(tmp_path: Path, change: Any, said: str) -> None:
    file = rewrite(written(tmp_path), lambda m: (change(m), None)[1], seal=True)
    assert said in failure(file, NormswapError, model=small()).message


def test_a_source_of_the_wrong_form_is_one_clear_error(tmp_path: Path) -> None:
    file = rewrite(written(tmp_path), lambda m: m.update(source={"kind": "zip", "name": "a"}), seal=True)
    assert "unknown kind, 'zip'" in failure(file).message
    file = rewrite(file, lambda m: m.update(source=[1]), seal=True)
    assert "source cannot be read" in failure(file).message


def test_tensors_that_were_taken_out_or_put_in_are_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "3.weight"}, file, metadata=metadata)
    assert "1 missing:\n    3.weight" in failure(file, WeightsError, model=small()).message
    save_file({**tensors, "new": torch.zeros(1)}, file, metadata=metadata)
    assert "1 unexpected:\n    new" in failure(file, WeightsError, model=small()).message
    save_file({k: v for k, v in tensors.items() if "layer.0.scale" not in k}, file, metadata=metadata)
    assert "is damaged" in failure(file, model=small()).message


def test_nan_is_named_and_can_be_allowed(tmp_path: Path) -> None:
    converted = normswap.convert(small(), "gn")
    converted[1].weight.data[2] = torch.nan
    file = save(converted, tmp_path / "a.safetensors")
    assert failure(file, WeightsError, model=small()).message.endswith("1 not finite:\n    1.weight")
    assert contents(load(file, model=small(), allow_nonfinite=True)) == contents(converted)


@pytest.mark.parametrize("path", [3, None, [1]])
def test_what_is_no_path_is_an_option_error(path: object) -> None:
    with pytest.raises(OptionError, match="the path of a file is needed"):
        normswap.load(path)
