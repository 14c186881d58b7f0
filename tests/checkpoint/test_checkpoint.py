"""Files that normswap writes: round trips, what they refuse, and that a failed write leaves nothing behind."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, classes, contents, randomized, relative, run
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import DenseNet, get_model

import normswap
from normswap.checkpoint.manifest import digest, is_ours, read_manifest
from normswap.checkpoint.saving import load, save, save_state
from normswap.conversion.history import Calibrated
from normswap.conversion.record import record_of
from normswap.conversion.revert import revert
from normswap.errors import CheckpointError, NormswapError, OutputError, RevertError, WeightsError
from normswap.files import writing

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGETS = ["gn", "frozen", "fused", "ln", "renorm", "sync"]


def resnet() -> nn.Module:
    return randomized(get_model("resnet18", weights=None, num_classes=4))


def mobilenet() -> nn.Module:
    return randomized(get_model("mobilenet_v3_small", weights=None, num_classes=4))


def densenet() -> nn.Module:
    """Pre-activation: most of its norms are prescaled, not folded. No torchvision name builds it."""
    return randomized(DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4))


class Small(nn.Sequential):
    """Two convolutions, each with its BN, of several eps and momenta; `(N, 3, H, W)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, eps=1e-3, momentum=0.01),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.BatchNorm2d(width, momentum=None),
        )


def small(**kwargs: Any) -> nn.Module:
    return randomized(Small(**kwargs))


def norm_facts(model: nn.Module) -> list[Any]:
    """Class, eps, momentum and flags of each batch norm."""
    return [
        (path, type(m), m.eps, m.momentum, m.affine, m.track_running_stats)
        for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def written(folder: Path, to: str = "gn", model: nn.Module | None = None, **kwargs: Any) -> Path:
    return save(normswap.convert(model or small(), to, **kwargs), folder / "a.safetensors", overwrite=True)


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


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "own", "to"),
    [*((mobilenet, False, to) for to in TARGETS), *((densenet, True, to) for to in TARGETS), (resnet, False, "gn")],
)
def test_a_round_trip_keeps_every_bit_and_can_still_be_undone(
    tmp_path: Path, make: Callable[[], nn.Module], own: bool, to: str
) -> None:
    original = make()
    converted = normswap.convert(original, to, check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=make() if own else None)
    assert contents(loaded) == contents(converted)
    assert classes(loaded) == classes(converted)
    assert repr(loaded) == repr(converted)
    assert relative(run(converted, IMAGE), run(loaded, IMAGE)) < 1e-5
    back = revert(loaded)
    assert contents(back) == contents(original)
    assert norm_facts(back) == norm_facts(original)
    assert repr(back) == repr(original)
    assert relative(run(original, IMAGE), run(back, IMAGE)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("to", ["gn", "frozen", "fused"])
def test_a_network_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype, to: str) -> None:
    original = small().to(dtype)
    converted = normswap.convert(original, to, check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert contents(loaded) == contents(converted)
    assert {b.dtype for b in loaded.buffers() if b.is_floating_point()} <= {dtype}
    assert loaded(IMAGE.to(dtype)).dtype == dtype
    assert contents(revert(loaded)) == contents(original)


def test_a_network_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    original = small()
    original[3].to(torch.float64)
    converted = normswap.convert(original, "frozen", check=False)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert contents(loaded) == contents(converted)


def test_a_network_in_channels_last_keeps_its_memory_format(tmp_path: Path) -> None:
    converted = normswap.convert(small().to(memory_format=torch.channels_last), "gn")
    strides = [p.stride() for p in converted.parameters()]
    assert strides[0] == (27, 1, 9, 3)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert [p.stride() for p in loaded.parameters()] == strides
    assert contents(loaded) == contents(converted)


@pytest.mark.parametrize("to", ["gn", "frozen", "fused", "renorm"])
def test_requires_grad_is_kept_and_comes_back_on_revert(tmp_path: Path, to: str) -> None:
    original = small()
    original[0].weight.requires_grad_(False)
    original[1].weight.requires_grad_(False)
    original[1].bias.requires_grad_(False)
    original[4].bias.requires_grad_(False)
    converted = normswap.convert(original, to)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=small())
    assert flags(loaded) == flags(converted)
    assert flags(revert(loaded)) == flags(original)


def test_a_given_network_with_other_flags_gets_those_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert all(flags(load(file, model=small().requires_grad_(False))).values())


class Holding(Small):
    """With a buffer that is in no state dict, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(0, 1, 8).view(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.tail = nn.Linear(8, 8, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = self[i](x)
        return self.tail(self.head((x + self.grid).mean((2, 3))))


def test_buffers_that_no_state_dict_holds_are_those_of_the_rebuilt_network(tmp_path: Path) -> None:
    original = randomized(Holding())
    converted = normswap.convert(original, "gn")
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=Holding())
    assert "grid" not in load_file(tmp_path / "a.safetensors")
    assert relative(run(converted, IMAGE), run(loaded, IMAGE)) < 1e-6


def test_tied_parameters_are_written_once_and_are_one_again(tmp_path: Path) -> None:
    converted = normswap.convert(randomized(Holding()), "gn")
    file = save(converted, tmp_path / "a.safetensors")
    names = [k for k in load_file(file) if k in ("head.weight", "tail.weight")]
    assert len(names) == 1
    loaded = load(file, model=Holding())
    assert loaded.head.weight is loaded.tail.weight
    untied = Holding()
    untied.tail.weight = nn.Parameter(torch.zeros(8, 8))
    loaded = load(file, model=untied)
    assert loaded.head.weight is loaded.tail.weight
    assert torch.equal(loaded.tail.weight, converted.head.weight)


def test_aliased_modules_stay_one_module(tmp_path: Path) -> None:
    def build() -> nn.Module:
        block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        return nn.Sequential(block, nn.ReLU(), block)

    original = randomized(build())
    converted = normswap.convert(original, "gn", groups=1)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=build())
    assert loaded[0] is loaded[2]
    assert type(loaded[0][1]) is type(converted[0][1])
    assert contents(loaded) == contents(converted)
    assert contents(revert(loaded)) == contents(original)


def test_a_root_that_is_itself_a_norm_makes_the_round_trip(tmp_path: Path) -> None:
    original = randomized(nn.BatchNorm2d(8))
    converted = normswap.convert(original, "gn", groups=2)
    loaded = load(save(converted, tmp_path / "a.safetensors"), model=nn.BatchNorm2d(8))
    assert contents(loaded) == contents(converted)
    assert contents(revert(loaded)) == contents(original)


def test_a_loaded_network_is_in_eval_mode_and_can_be_saved_again(tmp_path: Path) -> None:
    file = save(normswap.convert(resnet().train(), "gn", check=False), tmp_path / "a.safetensors")
    loaded = load(file)
    assert not any(m.training for m in loaded.modules())
    again = save(loaded, tmp_path / "b.safetensors")
    assert {k: bits(v) for k, v in load_file(again).items()} == {k: bits(v) for k, v in load_file(file).items()}
    assert read_manifest(again) == read_manifest(file)


def test_a_loaded_network_can_be_saved_over_the_file_its_weights_are_mapped_from(tmp_path: Path) -> None:
    file = written(tmp_path)
    before = contents(load(file, model=small()))
    save(load(file, model=small()), file, overwrite=True)
    assert contents(load(file, model=small())) == before


def test_saving_changes_neither_the_network_nor_the_random_state(tmp_path: Path) -> None:
    converted = normswap.convert(resnet(), "gn", check=False)
    before, state = contents(converted), torch.get_rng_state()
    save(converted, tmp_path / "a.safetensors")
    assert contents(converted) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_calibrated_network_is_restored_and_a_trained_one_is_not(tmp_path: Path) -> None:
    original = small()
    converted = normswap.convert(original, "gn")
    with torch.no_grad():
        converted[1].weight.mul_(1.5)
        converted[4].bias.add_(0.25)
    trained = load(save(converted, tmp_path / "trained.safetensors"), model=small())
    with pytest.raises(RevertError, match="the first is 1"):
        revert(trained)
    record_of(converted).history.append(Calibrated(8))
    loaded = load(save(converted, tmp_path / "calibrated.safetensors"), model=small())
    assert contents(loaded) == contents(converted)
    assert record_of(loaded).history == [Calibrated(8)]
    assert contents(revert(loaded)) == contents(original)


def test_a_conversion_that_kept_nothing_cannot_be_undone_after_loading(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, undo=False), model=small())
    assert not any("undo" in name for name in load_file(tmp_path / "a.safetensors"))
    with pytest.raises(RevertError, match="kept nothing"):
        revert(loaded)


def test_the_manifest_says_what_was_done_with_what(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path, model=resnet(), groups=16))
    assert manifest["format"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["normswap"] == normswap.__version__
    assert manifest["source"]["name"] == "resnet18"
    assert manifest["source"]["args"] == {"num_classes": 4}
    assert len(manifest["plan"]["steps"]) == 20
    assert manifest["plan"]["steps"][0]["options"]["num_groups"] == 16
    assert 0 < manifest["check"]["error"] < 1e-4
    assert str(tmp_path) not in json.dumps(manifest)


# --- how it is loaded -----------------------------------------------------------------------------------------------


def test_loading_initialises_no_weights_and_maps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, model=resnet(), check=False)
    initialised = []

    def watch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def init(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not tensor.is_meta:
                initialised.append(tensor.shape)
            return original(tensor, *args, **kwargs)

        return init

    for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, watch(getattr(nn.init, name)))
    state = torch.get_rng_state()
    loaded = load(file)
    assert initialised == []
    assert torch.equal(torch.get_rng_state(), state)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()
    monkeypatch.undo()
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_a_detectors_frozen_norms_and_eps_survive_a_round_trip_of_its_source(tmp_path: Path) -> None:
    from normswap.sources.resolve import outline, parse

    model, source = outline(parse("retinanet_resnet50_fpn"), "COCO_V1")
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    before = [m.eps for m in model.modules() if "FrozenBatchNorm" in type(m).__name__]
    assert before == [0.0] * 53
    converted = normswap.convert(model, "gn", sources=["frozen"], check=False, undo=False, inplace=True)
    record_of(converted).source = source.to_dict()
    file = save(converted, tmp_path / "a.safetensors")
    loaded = load(file)
    assert repr(loaded) == repr(converted)
    assert not any("BatchNorm" in type(m).__name__ for m in loaded.modules())


# --- whose file it is ---------------------------------------------------------------------------------------------


def test_a_file_of_an_own_architecture_needs_it_and_says_so(tmp_path: Path) -> None:
    error = failure(written(tmp_path))
    assert error.message == f"{tmp_path / 'a.safetensors'} does not know how to build its architecture"
    assert f'normswap.load("{tmp_path / "a.safetensors"}", model=my_model)' in error.hint


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
    assert error.hint == "pip install --upgrade normswap"


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


# --- writing --------------------------------------------------------------------------------------------------------


def refused(path: Path, **kwargs: Any) -> OutputError:
    with pytest.raises(OutputError) as caught:
        save(normswap.convert(small(), "gn", check=False), path, **kwargs)
    return caught.value


def test_an_output_that_cannot_be_written_is_refused_before_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.safetensors").write_text("mine")
    os.mkfifo(tmp_path / "pipe.safetensors")
    names = sorted(p.name for p in tmp_path.iterdir())
    file, pipe = tmp_path / "file.safetensors", tmp_path / "pipe.safetensors"
    assert refused(tmp_path).message == f"{tmp_path} is a folder"
    assert refused(tmp_path / "no" / "a.safetensors").message == f"the folder {tmp_path / 'no'} does not exist"
    assert refused(file / "a.safetensors").message == f"{file} is not a folder"
    assert refused(pipe).message == f"{pipe} is not a regular file"
    error = refused(file)
    assert error.message == f"{file} exists already"
    assert "overwrite=True" in error.hint
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    assert refused(tmp_path / "a.safetensors").message == f"the folder {tmp_path} is not writable"
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("x.pt", "x.safetensors"),
        ("nets.py", "nets.safetensors"),
        ("v1", "v1.safetensors"),
        ("v1.2", "v1.2.safetensors"),
    ],
)
def test_only_names_of_safetensors_files_are_written(tmp_path: Path, name: str, better: str) -> None:
    (tmp_path / "nets.py").write_text("mine")
    for overwrite in (False, True):
        assert refused(tmp_path / name, overwrite=overwrite).hint == f"Name it {tmp_path / better}."
        with pytest.raises(OutputError, match="not a name for what normswap writes"):
            save_state(small(), tmp_path / name, overwrite=overwrite)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("nets.py", "mine")]


def test_a_name_too_long_for_the_disk_is_one_clear_error(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / ("x" * 300 + ".safetensors")).message
    assert list(tmp_path.iterdir()) == []
    longest = tmp_path / ("x" * 243 + ".safetensors")
    save(normswap.convert(small(), "gn", check=False), longest)
    assert is_ours(longest)


@pytest.mark.parametrize("name", ["a [bold]b[-] ü 漢.safetensors", "big.SAFETENSORS", ".hidden.safetensors"])
def test_names_with_spaces_markup_and_other_letters_are_written_and_read(tmp_path: Path, name: str) -> None:
    save(normswap.convert(small(), "gn", check=False), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    load(tmp_path / name, model=small())


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def not_serialized(tensors: Any, path: Path, **kwargs: Any) -> Any:
    Path(path).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "failing", "kind", "said"),
    [
        ("os.replace", no_space, OutputError, "the disk is full"),
        ("os.fsync", no_space, OutputError, "the disk is full"),
        ("tempfile.mkdtemp", no_space, OutputError, "the disk is full"),
        ("safetensors.torch.save_file", no_space, OutputError, "the disk is full"),
        (
            "safetensors.torch.save_file",
            not_serialized,
            OutputError,
            r"a\.safetensors cannot be written: the disk is full$",
        ),
        ("os.replace", interrupted, KeyboardInterrupt, None),
        ("safetensors.torch.save_file", interrupted, KeyboardInterrupt, None),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    failing: Any,
    kind: type[BaseException],
    said: str | None,
) -> None:
    converted = normswap.convert(small(), "gn", check=False)
    file = tmp_path / "a.safetensors"
    for old in (None, b"the old file"):
        if old is not None:
            file.write_bytes(old)
        with monkeypatch.context() as patched:
            patched.setattr(place, failing)
            with pytest.raises(kind, match=said):
                save(converted, file, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["a.safetensors"])
        assert old is None or file.read_bytes() == old
    assert is_ours(save(converted, file, overwrite=True))


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    """A real one: a limit on the size of files makes the kernel refuse."""
    import resource
    import signal

    converted = normswap.convert(small(width=64), "gn", check=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            save(converted, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert written(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_atomic_puts_a_whole_file_in_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with writing.atomic(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        assert temporary.name == "a"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


# --- a plain state dict -------------------------------------------------------------------------------------------


def test_a_state_dict_is_written_with_tied_tensors_under_each_name(tmp_path: Path) -> None:
    model = randomized(Holding())
    file = save_state(model, tmp_path / "a.safetensors")
    assert {k: bits(v) for k, v in load_file(file).items()} == {k: bits(v) for k, v in model.state_dict().items()}
    assert not is_ours(file)
    Holding().load_state_dict(load_file(file))


@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel"])
@pytest.mark.parametrize("branch", ["conv", "sum"])
def test_a_norm_that_calibrate_gave_gamma_and_beta_is_loaded_with_them(tmp_path: Path, to: str, branch: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y if branch == "conv" else y + y.flip(0))

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(4, 3, 8, 8)
    converted = normswap.convert(net, to, example_inputs=x).eval()
    normswap.calibrate(converted, reference=net, data=x)
    normswap.save(converted, tmp_path / "net.safetensors")
    loaded = normswap.load(tmp_path / "net.safetensors", model=Net())
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), converted(x))
