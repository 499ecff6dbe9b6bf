"""Checkpoints go to the disk a tensor at a time; what a disk refuses leaves the last one."""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import TrainingError, UserError
from qat.training.checkpoint import load_checkpoint, save_checkpoint


def state(value: float, count: int) -> dict[str, Any]:
    return {"weights": {"w": torch.full((count,), value)}, "progress": {"step": 1}}


def test_saving_makes_no_copy_of_the_state(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.ckpt", state(1.0, 10_000_000)
    save_checkpoint(path, state(1.0, 10))  # what it imports and opens once
    tracemalloc.start()
    save_checkpoint(path, saved)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40_000_000
    assert most < 4_000_000
    found = load_checkpoint(path)
    assert found is not None
    assert torch.equal(found["weights"]["w"], saved["weights"]["w"])


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path, broken = tmp_path / "a.ckpt", state(float("nan"), 10)
    torch.save(broken, path)
    with pytest.raises(UserError, match=r"a\.ckpt: w is not finite; start the run anew"):
        load_checkpoint(path)


def test_a_disk_that_is_full_half_way_keeps_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, state(1.0, 10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*a\.ckpt: File too large"):
            save_checkpoint(path, state(2.0, 1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = load_checkpoint(path)
    assert found is not None
    assert torch.equal(found["weights"]["w"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("content", [b"", b"hello\n", b"h\x8eq\x65.", b"]q\x00(K\x01e."])
def test_what_torch_never_wrote_is_damage_whatever_its_reader_raises(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert load_checkpoint(path) is None
    assert load_checkpoint(tmp_path / "none.ckpt") is None
    with pytest.raises(UserError, match="a folder and no checkpoint; remove it to begin anew"):
        load_checkpoint(tmp_path)
