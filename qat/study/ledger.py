"""Where a QAT arm's effect comes from, seed by seed, against the run that differs in QAT alone:

    throughput  float bpb of the baseline at the arm's number of steps - at its own
    training    float bpb of the arm - of the baseline at as many steps
    gap         (artifact - float) of the arm - of the baseline stored alike

The three telescope to the difference of the artifacts. The baseline at the arm's number of steps is
a run of its own, with its whole schedule (``ledger=full``), or else an estimate: before the rate
falls, the baseline's training loss is fitted as a + b * log(step), and a run of other length is
taken to end b * log(ratio of steps) elsewhere. It knows nothing of the warmdown.

With grids as coarse as ternary, and with learned scales, the float masters are no model any more;
then training and gap are large and of opposite sign, and only their sum means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qat.runs.result import Result
from qat.runs.run_folder import METRICS, read_metrics
from qat.study.findings import Ledger, Treatment
from qat.study.significance import interval

FIRST_SHARE = 0.25  # of the steps, left out of the fit: the loss falls otherwise at first
FEWEST_ROWS = 8


class Twin(NamedTuple):
    """A run of the arm, its baseline, the baseline's artifact stored as the arm's is."""

    arm: Result
    baseline: Result
    baseline_folder: Path
    baseline_bpb: float
    equal_steps_bpb: float | None  # float weights of the baseline at the arm's number of steps


class Parts(NamedTuple):
    throughput: float
    training: float
    gap: float
    total: float


def parts_of(twin: Twin, throughput: float) -> Parts:
    """Bits per byte; ``throughput`` as measured or estimated."""
    arm, base = twin.arm, twin.baseline
    assert arm.val_bpb_artifact is not None
    assert arm.val_bpb_float is not None
    assert base.val_bpb_float is not None
    total = arm.val_bpb_artifact - twin.baseline_bpb
    training = arm.val_bpb_float - base.val_bpb_float - throughput
    return Parts(throughput, training, total - throughput - training, total)


def ledger_of(treatment: Treatment, twins: Sequence[Twin]) -> Ledger | None:
    """None if no run of the arm has a baseline."""
    if not twins:
        return None
    is_measured = all(twin.equal_steps_bpb is not None for twin in twins)
    found = []
    for twin in twins:
        assert twin.baseline.val_bpb_float is not None
        if is_measured and twin.equal_steps_bpb is not None:
            throughput = twin.equal_steps_bpb - twin.baseline.val_bpb_float
        else:
            throughput = estimated_throughput(twin)
        found.append(parts_of(twin, throughput))
    throughput_part, training, gap, total = (interval(part) for part in zip(*found, strict=True))
    lost = np.mean([1 - (t.arm.steps or 0) / (t.baseline.steps or 1) for t in twins])
    basis = (
        "the baseline of as many steps"
        if is_measured
        else "by the baseline's training loss before its warmdown"
    )
    return Ledger(
        name=treatment.name,
        is_measured=is_measured,
        throughput=throughput_part,
        training=training,
        gap=gap,
        total=total,
        at_equal_steps=interval([parts.training + parts.gap for parts in found]),
        basis=f"{basis}; {100 * lost:.1f} % of the steps lost",
        against=twins[0].baseline.arm or twins[0].baseline.qat,
    )


def estimated_throughput(twin: Twin) -> float:
    """What the arm's number of steps costs the baseline, in bits per byte of float weights."""
    base = twin.baseline
    assert base.steps
    assert base.val_bpb_float is not None
    assert base.val_loss_float is not None
    rows = read_metrics(twin.baseline_folder / METRICS)
    slope = loss_per_log_step(
        [int(row["step"]) for row in rows],
        [float(row["train_loss"]) for row in rows],
        [float(row["rate"]) for row in rows],
    )
    bits_per_nat = base.val_bpb_float / base.val_loss_float
    return slope * math.log((twin.arm.steps or base.steps) / base.steps) * bits_per_nat


def loss_per_log_step(
    steps: Sequence[int], losses: Sequence[float], rates: Sequence[float]
) -> float:
    """Slope of the loss over log(step) where the rate is at its peak, without the first steps.

    With fewer than ``FEWEST_ROWS`` such rows (a rate that falls from the start), of all rows but
    the first ones.
    """
    step, loss, rate = (np.asarray(values, dtype=np.float64) for values in (steps, losses, rates))
    late = step > FIRST_SHARE * step.max()
    at_peak = late & (rate >= rate.max())
    chosen = at_peak if at_peak.sum() >= FEWEST_ROWS else late
    if chosen.sum() < 2:
        return 0.0
    return float(np.polyfit(np.log(step[chosen]), loss[chosen], 1)[0])
