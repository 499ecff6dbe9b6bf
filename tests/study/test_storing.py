"""artifact.method=gptq: a run stored by GPTQ is on its grid, scored from its file, and closer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat.artifact.container import read_artifact
from tests.conftest import Done, result_of

RUNS = Path("logs/runs")


@pytest.fixture
def stored(train: Callable[..., Done]) -> tuple[Path, Path]:
    """The same training rounded, and stored by GPTQ."""
    for name, method in (("rounded", "round"), ("by_gptq", "gptq")):
        done = train("grid=int4", f"artifact.method={method}", f"run_name={name}", "max_steps=40")
        assert done.code == 0, done.err
    return RUNS / "rounded", RUNS / "by_gptq"


def test_gptq_stores_other_codes_on_the_same_grid(stored: tuple[Path, Path]) -> None:
    rounded, by_gptq = (read_artifact(folder / "artifact.qat") for folder in stored)
    assert rounded.plan == by_gptq.plan
    for name, weight in rounded.weights.items():
        is_matrix = rounded.plan.entries[name].grid is not None
        assert torch.equal(weight, by_gptq.weights[name]) != is_matrix
    row = result_of(stored[1])
    assert row["grid"] == "int4+gptq"
    assert row["val_bpb_snapped"] == pytest.approx(row["val_bpb_artifact"], abs=1e-12)
    assert row["val_bpb_float"] == pytest.approx(result_of(stored[0])["val_bpb_float"], abs=1e-12)
    assert row["quant_gap_bpb"] < result_of(stored[0])["quant_gap_bpb"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("artifact.method=nearest",), "artifact.method = nearest: choose from round, gptq"),
        (("artifact.method=gptq", "artifact.fit=true"), "both choose codes; give one"),
    ],
)
def test_mistakes(asked: tuple[str, ...], message: str, train: Callable[..., Done]) -> None:
    done = train(*asked)
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert message in done.err
