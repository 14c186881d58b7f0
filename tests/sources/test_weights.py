"""Checkpoints that others wrote: every container, wrapping and prefix, and every kind of damage."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.errors import WeightsError
from normswap.sources.weights import empty_parameters, has_empty_parameters, load_state, read_state


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, width, 3), bn=nn.BatchNorm2d(width), flat=nn.Flatten(), fc=nn.Linear(width, 2))
    )


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    assert all(state[k].dtype == v.dtype and torch.equal(state[k], v) for k, v in expected.items())


def failure(path: Path, **kwargs: Any) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        read_state(path, **kwargs)
    return caught.value


def misfit(model: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(WeightsError) as caught:
        load_state(model, state, "file.pth")
    return caught.value.message


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


# --- containers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".ckpt", ".bin", ""])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_checkpoints_are_read_whatever_their_suffix(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = net().state_dict()
    file = tmp_path / f"weights{suffix}"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    assert_same(read_state(file), dict(state))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "Gewichte für ü [b].safetensors"])
def test_safetensors_are_recognised_by_content_or_name(tmp_path: Path, name: str) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / name)
    loaded = read_state(tmp_path / name)
    assert_same({k: loaded[k] for k in state}, dict(state))


def test_a_zip_checkpoint_is_mapped_not_copied(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    tensor = read_state(tmp_path / "a.pth")["weight"]
    start = tensor.data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    owners = [parts[5] for parts in ranges if len(parts) == 6 and _within(parts[0], start)]
    assert owners == [str(tmp_path / "a.pth")]


def _within(interval: str, address: int) -> bool:
    low, high = (int(part, 16) for part in interval.split("-"))
    return low <= address < high


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"step": torch.tensor(5), "net": state},
        lambda state: {"model": {"state_dict": state}, "args": None},
        lambda state: {"params": state},
        lambda state: {"state_dict_ema": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        lambda state: {f"_forward_module.{k}": v for k, v in state.items()},
        lambda state: {re.sub(r"^(\w+)\.", r"\1._orig_mod.", k): v for k, v in state.items()},
    ],
)
def test_wrappings_and_wrapper_prefixes_are_taken_off(tmp_path: Path, wrap: Any) -> None:
    state = dict(net().state_dict())
    torch.save(wrap(state), tmp_path / "a.pth")
    assert_same(read_state(tmp_path / "a.pth"), state)


def test_the_models_own_weights_win_over_its_average(tmp_path: Path) -> None:
    torch.save({"state_dict_ema": {"w": torch.ones(1)}, "state_dict": {"w": torch.zeros(1)}}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth")["w"] == 0


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "a.b.c."])
def test_a_prefix_that_all_names_share_is_dropped_where_that_makes_them_fit(prefix: str) -> None:
    model, state = net(), net().state_dict()
    load_state(model, {prefix + k: v for k, v in state.items()}, "file.pth")
    assert_same(dict(model.state_dict()), dict(state))


def test_a_name_that_begins_like_a_prefix_is_kept() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    model, state = Wrapper(), Wrapper().state_dict()
    load_state(model, state, "file.pth")
    assert torch.equal(model.model.weight, state["model.weight"])


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "created"
    payload = {"state_dict": {"w": torch.zeros(1)}, "extra": Payload(target)}
    torch.save(payload, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    error = failure(tmp_path / "a.pth")
    assert "pickled code" in error.message
    assert "mkdir" in error.message
    assert "trust_pickle=True" in error.hint
    assert not target.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_with_code_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "created"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Payload(target), protocol=protocol))
    assert "pickled code" in failure(tmp_path / "a.pkl").message
    assert not target.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_an_ancient_protocol_is_no_checkpoint_and_never_run(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "created"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Payload(target), protocol=protocol))
    assert "neither a safetensors nor a torch checkpoint" in failure(tmp_path / "a.pkl").message
    assert not target.exists()


def test_code_runs_only_for_those_who_trust_it(tmp_path: Path) -> None:
    target = tmp_path / "created"
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Payload(target)}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth", trust_pickle=True).keys() == {"w"}
    assert target.is_dir()


def test_a_pickled_module_is_refused_and_read_when_trusted(tmp_path: Path) -> None:
    model = nn.DataParallel(net())
    torch.save({"model": model}, tmp_path / "a.pt")
    error = failure(tmp_path / "a.pt")
    assert "pickled code" in error.message
    assert "torch.nn" in error.message
    assert_same(read_state(tmp_path / "a.pt", trust_pickle=True), dict(model.module.state_dict()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused_and_read_when_trusted(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    torch.jit.script(model).save(str(tmp_path / "a.pt"))
    assert "pickled code" in failure(tmp_path / "a.pt").message
    assert_same(read_state(tmp_path / "a.pt", trust_pickle=True), dict(model.state_dict()))


def test_trusted_code_that_raises_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    torch.save(Payload(tmp_path / "taken"), tmp_path / "a.pth")
    assert "cannot be read as a torch checkpoint" in failure(tmp_path / "a.pth", trust_pickle=True).message


# --- damage -------------------------------------------------------------------------------------------------------


def whole(folder: Path, kind: str) -> bytes:
    if kind == "safetensors":
        save_file(net().state_dict(), folder / "whole")
    else:
        torch.save(net().state_dict(), folder / "whole", _use_new_zipfile_serialization=kind == "zip")
    return (folder / "whole").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_one_clear_error(tmp_path: Path, kind: str, kept: float, suffix: str) -> None:
    data = whole(tmp_path, kind)
    file = tmp_path / f"cut{suffix}"
    file.write_bytes(data[: int(len(data) * kept)])
    error = failure(file)
    assert str(file) in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("garbage", [b"x", b"PK", b"\x80", b"<html>404</html>" * 9, b"\x80\x02]q\x00.", bytes(64)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_garbage_is_one_clear_error(tmp_path: Path, garbage: bytes, suffix: str) -> None:
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(garbage)
    assert str(file) in failure(file).message


def test_an_empty_file_a_folder_and_nothing_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    assert failure(tmp_path / "empty.pth").message == f"{tmp_path / 'empty.pth'} is empty"
    assert failure(tmp_path).message == f"{tmp_path} is a folder, not a checkpoint file"
    assert failure(tmp_path / "no.pth").message == f"{tmp_path / 'no.pth'} does not exist"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.pth").touch()
    monkeypatch.setattr(Path, "open", refuse)
    assert failure(tmp_path / "a.pth").message == f"{tmp_path / 'a.pth'} cannot be read: Permission denied"


def test_a_name_too_long_for_the_disk_is_one_clear_error(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in failure(tmp_path / ("x" * 300 + ".pth")).message


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3}, [1, 2], torch.zeros(2), None])
def test_a_checkpoint_without_tensors_by_name_says_what_was_expected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    error = failure(tmp_path / "a.pth")
    assert error.message == f"{tmp_path / 'a.pth'} holds no tensors by name"
    assert "state_dict, model_state_dict, model" in error.hint


# --- values -------------------------------------------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "value"), [*((d, v) for d in DTYPES for v in (NAN, INF, -INF)), (torch.float8_e4m3fn, NAN)]
)
def test_tensors_with_nan_or_inf_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.tensor([0.0, value]).to(dtype)
    state = {"good": torch.zeros(2).to(dtype), "a.bad": bad, "count": torch.tensor(3), "none": torch.zeros(0)}
    save_file(state, tmp_path / "a.safetensors")
    error = failure(tmp_path / "a.safetensors")
    assert error.message.endswith("holds NaN or Inf:\n  1 not finite:\n    a.bad")
    assert "allow_nonfinite=True" in error.hint
    assert read_state(tmp_path / "a.safetensors", allow_nonfinite=True).keys() == state.keys()


def test_at_most_ten_tensors_with_nan_are_named(tmp_path: Path) -> None:
    save_file({f"t{i:02}": torch.full((1,), torch.nan) for i in range(12)}, tmp_path / "a.safetensors")
    message = failure(tmp_path / "a.safetensors").message
    assert "12 not finite" in message
    assert [name for name in message.split() if re.fullmatch(r"t\d\d", name)] == [f"t{i:02}" for i in range(10)]
    assert message.endswith("... and 2 more")


def test_missing_unexpected_and_misshaped_names_are_listed_ten_each_with_their_counts() -> None:
    model = nn.ModuleDict({f"own{i:02}": nn.Linear(2, 2, bias=False) for i in range(13)})
    model["shape"] = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(11))
    state = {f"other{i:02}.weight": torch.zeros(1) for i in range(25)}
    state |= {f"shape.{i}.weight": torch.zeros(3, 2) for i in range(11)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = misfit(model, state)
    assert message.startswith("file.pth does not fit ModuleDict:\n  13 missing:\n    own00.weight")
    for title, pattern, more in (
        ("13 missing", r"own\d\d\.weight", 3),
        ("25 unexpected", r"other\d\d\.weight", 15),
        ("11 mis-shaped", r"shape\.\d+\.weight: \(3, 2\) in the file, \(2, 2\) in the model", 1),
    ):
        part = message.partition(title)[2].partition("more")[0]
        assert len(re.findall(pattern, part)) == 10
        assert part.endswith(f"... and {more} ")
    assert_same(dict(model.state_dict()), before)


def test_only_what_does_not_fit_is_listed() -> None:
    state = dict(net().state_dict())
    state["fc.weight"] = torch.zeros(5, 4)
    assert misfit(net(), state) == (
        "file.pth does not fit Sequential:\n  1 mis-shaped:\n    fc.weight: (5, 4) in the file, (2, 4) in the model"
    )


def test_counters_of_batches_may_be_missing_or_too_many() -> None:
    source = net()
    state = dict(source.state_dict())
    del state["bn.num_batches_tracked"]
    model = net()
    load_state(model, state, "file.pth")
    assert torch.equal(model.bn.running_mean, source.bn.running_mean)
    assert torch.equal(model.conv.weight, source.conv.weight)
    assert model.bn.num_batches_tracked == 0
    state["conv.num_batches_tracked"] = torch.tensor(1)
    load_state(model, state, "file.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_a_checkpoint_is_cast_to_the_models_dtypes(dtype: torch.dtype) -> None:
    state = {k: (v * 10).to(dtype) for k, v in net().state_dict().items()}
    model = net()
    load_state(model, state, "file.pth")
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    assert dtypes.pop("bn.num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {torch.float32}
    assert torch.equal(model.conv.weight, state["conv.weight"].float())


def test_requires_grad_stays_as_the_model_has_it() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    load_state(model, net().state_dict(), "file.pth")
    assert not model.conv.weight.requires_grad
    assert model.fc.weight.requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


class SharedParameter(nn.Module):
    """One Parameter, made first and given to two modules."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(4, 3))
        self.embed, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.embed.weight = shared
        self.head.weight = shared


@pytest.mark.parametrize("model_class", [Tied, SharedParameter])
@pytest.mark.parametrize("present", [["embed.weight", "head.weight"], ["embed.weight"], ["head.weight"]])
def test_tied_tensors_stay_tied_whichever_of_their_names_the_file_has(model_class: Any, present: list[str]) -> None:
    weight = torch.randn(4, 3)
    with empty_parameters():
        empty = model_class()
    for model in (model_class(), empty):
        load_state(model, dict.fromkeys(present, weight), "file.pth")
        assert model.embed.weight is model.head.weight
        assert torch.equal(model.head.weight, weight)


def test_an_aliased_module_stays_one_module() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    weight, bias = torch.randn(3, 3, 1, 1), torch.randn(3)
    load_state(model, {"0.weight": weight, "0.bias": bias}, "file.pth")
    assert model[0] is model[2]
    assert torch.equal(model[2].weight, weight)


# --- empty parameters ---------------------------------------------------------------------------------------------


def test_modules_built_empty_have_parameters_without_values_and_real_buffers() -> None:
    with empty_parameters():
        model = net()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert has_empty_parameters(model)
    assert not any(p.is_meta for p in net().parameters())


def test_values_are_drawn_for_what_holds_values_alone() -> None:
    class Drawn(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight.data.normal_()
            nn.init.kaiming_normal_(self.weight)
            nn.init.normal_(self.weight, std=0.1)
            self.register_buffer("noise", torch.zeros(2).normal_())

    class Draws(TorchDispatchMode):
        devices: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "normal_" in str(func):
                self.devices.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with Draws() as seen, empty_parameters():
        assert Drawn(2, 2).noise.abs().min() > 0
    assert seen.devices == ["cpu"]


def test_requires_grad_is_kept_on_empty_parameters() -> None:
    with empty_parameters():
        module = nn.Module()
        module.register_parameter("fixed", nn.Parameter(torch.zeros(2), requires_grad=False))
    assert module.fixed.is_meta
    assert not module.fixed.requires_grad


def test_a_plain_tensor_attribute_without_values_counts_as_empty() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.norm = self.weight.detach().norm()

    with empty_parameters():
        model = Scaled()
    load_state(model, nn.Linear(2, 2).state_dict(), "file.pth")
    assert has_empty_parameters(model)
    assert not has_empty_parameters(Scaled())


def test_a_file_of_several_networks_tells_them_and_gives_the_first(tmp_path: Path) -> None:
    one, other, told = net().state_dict(), net().state_dict(), []
    torch.save({"model_ema": other, "model": one, "params": {"lr": 0.1}, "epoch": 3}, tmp_path / "two.pth")
    assert_same(read_state(tmp_path / "two.pth", when_several=told.append), one)
    assert told == [["model", "model_ema"]]
    torch.save({"model": one, "params": {"lr": 0.1}}, tmp_path / "one.pth")
    read_state(tmp_path / "one.pth", when_several=told.append)
    assert len(told) == 1


def test_code_of_a_pickle_that_cannot_be_imported_asks_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "gone.pth").write_bytes(b"\x80\x02cnowhere_to_be_found\nNet\n.")
    assert "PYTHONPATH" in str(failure(tmp_path / "gone.pth", trust_pickle=True).hint)
