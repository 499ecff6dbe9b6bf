"""The parts of a ledger, and the estimate of lost steps against a curve that is known."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.runs.result import Result
from qat.study.ledger import Twin, loss_per_log_step, parts_of

BPB = st.floats(0.5, 9.0)


def row(val_bpb_float: float, val_bpb_artifact: float) -> Result:
    return Result(
        run_name="r", status="finished", exit_code=0, error=None, arm=None, seed=1,
        profile="laptop", qat="none", grid="int6", hardware="h", commit="c", data=None,
        limit_bytes=1, val_bpb_float=val_bpb_float, val_bpb_artifact=val_bpb_artifact,
    )  # fmt: skip


@given(BPB, BPB, BPB, BPB, st.floats(-1.0, 1.0))
def test_parts_telescope(
    arm_float: float, arm_file: float, base_float: float, base_file: float, throughput: float
) -> None:
    twin = Twin(row(arm_float, arm_file), row(base_float, 0.0), None, base_file, None)  # type: ignore[arg-type]
    parts = parts_of(twin, throughput)
    assert sum(parts[:3]) == pytest.approx(arm_file - base_file, abs=1e-12)
    assert parts.gap == pytest.approx((arm_file - arm_float) - (base_file - base_float), abs=1e-12)
    equal_steps = base_float + throughput
    assert parts.training == pytest.approx(arm_float - equal_steps, abs=1e-12)


def test_the_slope_of_a_known_curve() -> None:
    """Only where the rate is at its peak: what the warmdown does is left out."""
    chooser = random.Random(0)
    steps = range(1, 1001)
    rates = [min(1.0, (1000 - step) / 300) for step in steps]
    losses = [
        5.0 - 0.3 * math.log(step) - (1 - rate) + chooser.gauss(0, 0.01)
        for step, rate in zip(steps, rates, strict=True)
    ]
    assert loss_per_log_step(steps, losses, rates) == pytest.approx(-0.3, abs=0.005)


def test_a_rate_that_falls_from_the_start() -> None:
    steps = range(1, 101)
    losses = [5.0 - 0.3 * math.log(step) for step in steps]
    rates = [1 - step / 100 for step in steps]
    assert loss_per_log_step(steps, losses, rates) == pytest.approx(-0.3, abs=1e-9)
    assert loss_per_log_step([1], [5.0], [1.0]) == 0.0
