"""A model of one layer has no skips: ``skip_weights`` is an empty tensor, which has neither bits a
weight nor a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import result_of

RUNS = Path("logs/runs")
ASKED = ("model.num_layers=1", "max_steps=4", "qat.start_step=2")


@pytest.mark.slow
def test_it_is_trained_and_stored_in_all_ways(train, program) -> None:
    done = train(*ASKED, "qat=int6", "run_name=r")
    assert done.code == 0, done.err
    row = result_of(RUNS / "r")
    assert row["on_grid_share"] == 1.0
    assert row["val_bpb_artifact"] == row["val_bpb_snapped"]
    limit = f"limit_bytes={row['code_bytes'] + 20_000}"
    done = program("eval.py", "task=fill", "run=r", limit, "out=filled.qat")
    assert done.code == 0, done.err
    assert 0.99 * 20_000 < Path("filled.qat").stat().st_size <= 20_000


@pytest.mark.slow
def test_all_else_is_done_with_it(train, program, cache_dir: Path) -> None:
    for name, *arm in (
        ("int6", "qat=int6"),
        ("golf", "qat=int8_golf", "plan.grid_min_elements=0"),
        ("rd", "qat=rd"),
        ("gptq", "grid=int4", "artifact.method=gptq"),
    ):
        done = train(*ASKED, *arm, f"run_name={name}")
        assert done.code == 0, done.err
    for command in (
        ("task=inspect", "run=int6"),
        ("run=int6", "eval.parts=[reliability,damage,layers]"),
        ("task=sample", "run=int6", "sample.max_tokens=4", "prompt=the"),
        ("task=cabinet", "run=int6", "variants=['gptq_int4*','rtn_int4','lqer*']"),
        ("task=submission", "run=int6", "out=handed_in"),
        ("task=export", "run=golf", "out=f.ptz"),
    ):
        done = program("eval.py", *command, f"data.cache_dir={cache_dir}")
        assert done.code == 0, (command, done.err)
