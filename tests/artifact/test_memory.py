"""Reading takes less memory than twice the tensors as float32, beside the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.artifact import coder
from qat.artifact.coder import CODERS, GENERAL
from qat.artifact.container import declared_bytes, pack
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import DTYPES, Codes
from tests.conftest import ROOT

PROCESS = 64_000_000  # what a reader may take beside: threads, dictionaries, parts
MEASURE = """
import json, sys
from pathlib import Path
from qat.artifact.container import read_artifact
from tests.damage import memory

read_artifact(Path(sys.argv[1]))
before = memory("VmRSS")
artifact = read_artifact(Path(sys.argv[2]))
print(json.dumps({"most": memory("VmHWM") - before, "kept": memory("VmRSS") - before}))
"""
MANY = {f"w{i}": (2048, 1024) for i in range(12)}
ONE, ROW = {"w": (6144, 4096)}, {"w": (24_000_000,)}
FILES = {
    **{f"int6 {name}": (Grid(bits=6), MANY, name) for name in CODERS},
    **{f"fp32 {name}": ("fp32", ONE, name) for name in GENERAL},
    "bf16": ("bf16", ONE, "zstd"),
    "asymmetric, ragged": (Grid(bits=4, range="asymmetric", group_size=100), ONE, "mix"),
    "one tensor": (Grid(bits=6), ONE, "mix"),
    "fp8": (Grid("fp8_e4m3"), ONE, "mix"),
    "one row": (Grid(bits=6), ROW, "mix"),
    "rotated": (Grid(bits=6, rotate=32), ONE, "mix"),
    "a rotated row": (Grid(bits=6, rotate=1024), ROW, "mix"),
    "a scale each": (Grid(bits=4, group_size=1, scale_dtype="fp32"), ONE, "zlib"),
}


def write(path: Path, storage: Grid | str, shapes: dict, name: str) -> int:
    """A file of random values; returns what its tensors take as float32."""
    encoded = []
    for tensor, shape in shapes.items():
        if isinstance(storage, str):
            entry = Entry(tensor, shape, None, storage)
            values = torch.randn(shape).to(DTYPES[storage])
            encoded.append(Encoded(entry, plain=values))
            continue
        entry = Entry(tensor, shape, storage)
        codes = torch.randn(shape).mul_(2).clamp_(-7, 7).to(torch.int8)
        codes = codes.abs() if storage.table.zero_has_sign else codes  # -1 is one of its NaNs
        scales = torch.ones(entry.scales_shape, dtype=DTYPES[storage.scale_dtype])
        zeros = torch.ones(entry.scales_shape, dtype=torch.int8) if entry.num_zeros else None
        encoded.append(Encoded(entry, Codes(codes, scales, zeros)))
    plan = Plan([item.entry for item in encoded])
    path.write_bytes(pack(encoded, plan, {}, name))
    return declared_bytes(plan)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "shapes", "name"), FILES.values(), ids=FILES)
def test_most_memory(
    storage: Grid | str, shapes: dict, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level, value in (("BROTLI_LEVEL", 1), ("ZSTD_LEVEL", 1)):
        monkeypatch.setattr(coder, level, value)  # to write faster; reading is the same
    small, large = tmp_path / "small.qat", tmp_path / "large.qat"
    write(small, storage, {"w": (8, 200)}, name)
    declared = write(large, storage, shapes, name)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    file_bytes = large.stat().st_size
    print(f"{name}: declared {declared:,}, file {file_bytes:,}, {taken}")
    assert 0.9 * declared / 2 < taken["most"] < 2 * declared + file_bytes + PROCESS
    assert taken["kept"] < 1.6 * declared + PROCESS
