"""Shards that become shards: never held as a whole, and to the bit what converting in memory gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import Held
from ran import Cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normswap.files import spilling

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
CASES = {
    "fold": ("tiny", "--to", "gn", "--groups", "2"),
    "prescale": ("residual", "--to", "gn", "--groups", "2"),
    "eps": ("tiny", "--to", "gn", "--groups", "2", "--eps", "1"),
    "fused": ("tiny", "--to", "fused"),
    "no undo": ("tiny", "--to", "gn", "--groups", "2", "--no-undo"),
    "copy": ("tiny", "--to", "ln", "--transfer", "copy"),
    "rules": ("deep", "--rule", "3.*=frozen", "--rule", "*=gn", "--groups", "2"),
    "zero": ("residual", "--to", "gn", "--groups", "2", "--zero-init-residual"),
    "centred": ("transformer", "--to", "rms", "--fold-affine", "--input", "2,5,8"),
}
MORE = """

class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.norm = nn.Linear(8, 8), Block(), nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x))))


def transformer():
    return Transformer()
"""

PLAIN = """
from torch import nn


def plain(blocks, width=64):
    layers = []
    for i in range(blocks):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)
"""


def weights(model: nn.Module, folder: Path, dtype: torch.dtype | None = None, *, shards: int = 3) -> dict[str, Tensor]:
    """Shards of the model's state, with norms that were trained, in folder/w."""
    state = model.state_dict()
    generator = torch.Generator().manual_seed(2)
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    (folder / "w").mkdir()
    places = {
        name: f"model-{i * shards // len(state) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)
    }
    for file in set(places.values()):
        save_file({name: state[name] for name, place in places.items() if place == file}, folder / "w" / file)
    (folder / "w" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state


def read(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a file or of shards."""
    if place.is_file():
        with safe_open(place, framework="pt") as file:
            return load_file(place), json.loads(file.metadata()["normswap"])
    tensors = {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return tensors, json.loads(json.loads((place / INDEX).read_text())["metadata"]["normswap"])


@pytest.fixture
def spills(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every tensor goes into a file, however small. Which were made."""
    made: list[Any] = []
    real = spilling.Spilling.room

    def room(self: Any, shape: Any, dtype: Any) -> Tensor:
        self._least = 1
        made.append(tuple(shape))
        return real(self, shape, dtype)

    monkeypatch.setattr(spilling, "LEAST", 1)
    monkeypatch.setattr(spilling.Spilling, "room", room)
    monkeypatch.setattr(spilling.Spilling.__init__, "__defaults__", (1,))
    return made


def made_both_ways(cli: Cli, folder: Path, network: str, *options: str) -> list[tuple[dict[str, Tensor], Any]]:
    call = ("convert", f"nets.py:{network}", "--weights", "w", *options)
    for more in (("-o", "one.safetensors"), ("--max-shard-size", "1KB", "-o", "out")):
        ran = cli(*call, *more)
        assert ran.code == 0, ran.err
    return [read(folder / name) for name in ("one.safetensors", "out")]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype, name
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_the_plan_are_those_of_converting_in_memory(
    cli: Cli, nets: Any, folder: Path, spills: list[Any], case: str
) -> None:
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + MORE)
    network, *options = CASES[case]
    scope: dict[str, Any] = {}
    exec((folder / "nets.py").read_text(), scope)  # the fixture has read it without what was added
    weights(scope[network](), folder)
    (tensors, manifest), (sharded, said) = made_both_ways(cli, folder, network, *options)
    assert_same(tensors, sharded)
    assert {k: v for k, v in said.items() if k != "sha256"} == {k: v for k, v in manifest.items() if k != "sha256"}
    assert said["check"]["error"] == manifest["check"]["error"]
    assert spills or case in ("copy", "prescale")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_cast_as_in_memory(
    cli: Cli, nets: Any, folder: Path, spills: list[Any], dtype: torch.dtype
) -> None:
    weights(nets.tiny(), folder, dtype)
    (tensors, _), (sharded, _) = made_both_ways(cli, folder, *CASES["fold"])
    assert_same(tensors, sharded)
    assert spills


def test_a_conversion_from_shards_to_shards_is_undone_bit_for_bit(
    cli: Cli, nets: Any, folder: Path, spills: list[Any]
) -> None:
    state = weights(nets.tiny(), folder)
    made_both_ways(cli, folder, *CASES["fold"])
    assert cli("convert", "out", "--to", "original", "--trust-code", "-o", "back.safetensors").code == 0
    assert_same(load_file(folder / "back.safetensors"), state)
    read_since = {name: t for file in (folder / "w").glob("*.safetensors") for name, t in load_file(file).items()}
    assert_same(read_since, state)


WRITES = """

class Clipped(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_load_state_dict_post_hook(Clipped.clip)

    def clip(self, keys):
        values = self.weight.detach().numpy()
        values[:] = values.clip(-0.1, 0.1)


def clipped():
    norm = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*norm, nn.Flatten(), Clipped(8, 4))
"""


def test_what_a_network_writes_to_its_weights_past_torch_is_kept(cli: Cli, folder: Path) -> None:
    """NumPy's writes are no operations that the command could see."""
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + WRITES)
    scope: dict[str, Any] = {}
    exec((folder / "nets.py").read_text(), scope)
    state = weights(scope["clipped"](), folder)
    (tensors, _), (sharded, _) = made_both_ways(cli, folder, "clipped", "--to", "gn", "--groups", "2")
    assert torch.equal(sharded["5.weight"], state["5.weight"].clip(-0.1, 0.1))
    assert_same(tensors, sharded)


class HeldInMemory(Held):
    """Counts what operations have made and what lies in no file."""

    def counts(self, tensor: Tensor) -> bool:
        if tensor.is_meta:
            return False
        storage = tensor.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        large = storage.nbytes() >= 1 << 12  # what is less may count, wherever it lies
        return not large or not any(low <= start and end <= high for low, high in spilling._file_ranges())


def test_no_more_than_a_shard_is_held_whatever_the_total(cli: Cli, folder: Path, spills: list[Any]) -> None:
    """Counted in bytes of tensors; in pages of the process, benchmarks/sharded.py measures it."""
    blocks = 18
    (folder / "nets.py").write_text(PLAIN)
    scope: dict[str, Any] = {}
    exec(PLAIN, scope)
    state = weights(scope["plain"](blocks), folder, shards=3)
    largest = max(sum(t.nbytes for t in load_file(file).values()) for file in (folder / "w").glob("*.safetensors"))
    call = ("convert", "nets.py:plain", "--arg", f"blocks={blocks}", "--weights", "w", "--to", "gn", "--groups", "2")
    with HeldInMemory() as held:
        ran = cli(*call, "--input", "1,3,4,4", "--max-shard-size", f"{largest}B", "-o", "out")
    assert ran.code == 0, ran.err
    assert sum(t.nbytes for t in state.values()) > 2.5 * largest
    assert held.peak <= 1.1 * largest


@pytest.mark.slow
def test_five_gigabytes_are_converted_in_the_memory_of_the_largest_shard(tmp_path: Path) -> None:
    """Resident memory of the process above that for a tiny network: at most the largest shard and a tenth."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("memory is given back on Linux alone")
    if shutil.disk_usage(tmp_path).free < 17e9:
        pytest.skip("the checkpoint, its copy and the result take 15 GB of disk")
    script = str(ROOT / "benchmarks" / "sharded.py")
    done = subprocess.run(
        [sys.executable, script, "--shard", "500MB", "--shards", "11", "--json", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["total"] >= 5e9
    assert found["peak"] - found["base"] <= 1.1 * found["largest"]
    assert list(tmp_path.iterdir()) == []


def test_a_distributed_checkpoint_becomes_shards(cli: Cli, nets: Any, folder: Path, spills: list[Any]) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    state = weights(nets.tiny(), folder)
    assert (
        cli("convert", "nets.py:tiny", "--weights", "w", "--to", "gn", "--groups", "2", "-o", "a.safetensors").code == 0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=folder / "d", no_dist=True)
    call = ("convert", "nets.py:tiny", "--weights", "d", "--to", "gn", "--groups", "2")
    ran = cli(*call, "--max-shard-size", "1KB", "-o", "out")
    assert ran.code == 0, ran.err
    assert_same(read(folder / "a.safetensors")[0], read(folder / "out")[0])
    assert spills
