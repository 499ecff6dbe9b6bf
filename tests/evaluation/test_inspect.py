"""Where the bytes are: sums that must hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qat.artifact.container import read_artifact
from qat.budget.budget import Budget
from qat.evaluation.inspect_task import order0_bits, size_lines
from qat.golf.bundle import count_code_bytes
from tests.conftest import result_of


def test_entropy() -> None:
    assert order0_bits(torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])) == pytest.approx(2.0)
    assert order0_bits(torch.zeros(9)) == 0.0


def test_the_lines_add_up(finished: Path) -> None:
    artifact = read_artifact(finished / "artifact.qat")
    lines = size_lines(artifact, Budget(1_000_000, count_code_bytes()))
    sizes = {name.split(" (")[0]: size for name, size in lines}
    parts = ("codes", "floats16", "floats32", "header", "magic, version, length, SHA-256")
    assert sum(sizes[name] for name in parts) == sizes["artifact"]
    row = result_of(finished)
    assert sizes["artifact"] == row["artifact_bytes"] == (finished / "artifact.qat").stat().st_size
    assert sizes["total"] == sizes["artifact"] + sizes["code"]
    assert lines[-1][1] == 1_000_000 - sizes["total"]


@pytest.mark.parametrize("coder", ["zstd", "mix"])
def test_every_tensor_has_a_row(coder: str, train, program) -> None:
    assert train("qat=int6", "max_steps=2", f"artifact.coder={coder}", "run_name=r").code == 0
    done = program("eval.py", "task=inspect", "run=r")
    assert done.code == 0, done.err
    artifact = read_artifact(Path("logs/runs/r/artifact.qat"))
    for entry in artifact.plan:
        assert len(re.findall(rf"│ {re.escape(entry.name)} ", done.out)) == 1, entry.name
    assert f"codes ({coder}, " in done.out
    assert "headroom below limit_bytes = 16,000,000" in done.out
