"""Tensors in files: no memory between operations, no value lost, nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from normswap.errors import OutputError
from normswap.files.spilling import Spilling, lent, mapped, release, room, spilled, spilled_copy, spilling

STATUS = Path("/proc/self/status")
linux = pytest.mark.skipif(not STATUS.exists(), reason="memory is given back, and read from /proc, on Linux alone")
COUNT = 1 << 22


def resident() -> int:
    """Bytes of memory that this process holds, pages of files included."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10


def read(folder: Path, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """A tensor of a file, mapped, and the values that it should have."""
    expected = torch.arange(count, dtype=torch.float32)
    save_file({"a": expected}, folder / "a.safetensors")
    found = load_file(folder / "a.safetensors")["a"]
    mapped([found])
    return found, expected


@linux
@pytest.mark.parametrize("touch", ["operation", "numpy"])
def test_pages_of_a_file_are_given_back_once_they_were_used(tmp_path: Path, touch: str) -> None:
    with Spilling(tmp_path):
        found, expected = read(tmp_path)
        gc.collect()
        before = resident()
        if touch == "operation":
            assert found.sum() == expected.sum()
        else:  # whoever reads the memory himself has taken the tensor by an operation
            assert found.view(-1).numpy().max() == COUNT - 1
            assert resident() - before > found.nbytes // 2
            torch.zeros(1)
        assert resident() - before < found.nbytes // 4


@linux
def test_a_spilled_tensor_holds_no_memory_and_keeps_what_is_written_to_it(tmp_path: Path) -> None:
    with Spilling(tmp_path):
        expected = torch.arange(COUNT, dtype=torch.float32)
        found = spilled(expected)
        gc.collect()
        before = resident()
        found.mul_(2)
        assert resident() - before < found.nbytes // 4
        release()
        assert torch.equal(found, expected * 2)
        assert spilled(found) is found


def test_what_is_written_to_a_tensor_of_a_read_file_is_not_lost(tmp_path: Path) -> None:
    with Spilling(tmp_path):
        found, expected = read(tmp_path)
        found[5:10].add_(1)
        release()
        expected[5:10] += 1
        assert torch.equal(found, expected)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"][:4], torch.arange(4.0))


def test_tensors_in_memory_keep_their_values_though_they_are_named(tmp_path: Path) -> None:
    with Spilling(tmp_path):
        found = torch.arange(COUNT, dtype=torch.float32)
        mapped([found])
        assert found.sum() > 0
        release()
        assert found[-1] == COUNT - 1


def test_memory_that_took_the_place_of_a_file_s_is_left_alone(tmp_path: Path) -> None:
    with Spilling(tmp_path):
        for _ in range(20):
            found, expected = read(tmp_path, 1 << 16)
            assert torch.equal(found, expected)
            del found
            again = torch.ones(1 << 16)
            release()
            assert bool((again == 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_a_copy_in_a_file_has_the_values_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 200, (7, 1, 33)).to(dtype)
    with Spilling(tmp_path, least=1):
        found = spilled_copy(values)
        assert found.data_ptr() != values.data_ptr()
    assert found.dtype == dtype
    assert torch.equal(found, values)


def test_nothing_is_spilled_without_being_asked_for(tmp_path: Path) -> None:
    values = torch.ones(COUNT)
    assert not spilling()
    assert spilled(values) is values
    assert torch.equal(spilled_copy(values), values)
    assert room((2, 3), torch.float16).shape == (2, 3)
    assert lent([values]) == {}


def test_no_file_has_a_name_while_it_is_used_and_no_folder_afterwards(tmp_path: Path) -> None:
    with Spilling(tmp_path):
        found = spilled(torch.ones(COUNT))
        assert list(tmp_path.iterdir()) == []  # so that nothing is left of a process that is killed either
    assert list(tmp_path.iterdir()) == []
    assert bool((found == 1).all())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Spilling(tmp_path), pytest.raises(OutputError, match="the disk is full"):
        room((COUNT,), torch.float32)
    assert list(tmp_path.iterdir()) == []
