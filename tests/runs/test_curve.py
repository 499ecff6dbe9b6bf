"""The validation curve: points where they belong, the same whatever stopped or forked the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.runs.run_folder import CURVE, read_metrics
from qat.study.curves import validation_curve
from tests.conftest import result_of

RUNS = Path("logs/runs")
ASKED = ("eval.curve_points=4", "eval.curve_tokens=256")


def points(name: str) -> list[tuple[str, str, str]]:
    rows = read_metrics(RUNS / name / CURVE)
    return [(row["step"], row["val_bpb_float"], row["val_bpb_snapped"]) for row in rows]


def test_a_point_at_the_end_of_each_part(train) -> None:
    done = train("qat=int4", "qat.start_step=6", *ASKED, "run_name=r")
    assert done.code == 0, done.err
    assert [(int(step), bool(snapped)) for step, _, snapped in points("r")] == [
        (3, False), (6, False), (9, True), (12, True),
    ]  # fmt: skip
    row = result_of(RUNS / "r")
    assert row["val_tokens"] > 256  # so these are of a part
    everything = ("eval.curve_points=1", "eval.curve_tokens=100000000")
    assert train("qat=int4", "qat.start_step=6", *everything, "run_name=whole").code == 0
    (last,) = points("whole")
    assert float(last[1]) == pytest.approx(row["val_bpb_float"], abs=1e-12)
    assert float(last[2]) == pytest.approx(row["val_bpb_snapped"], abs=1e-12)


def test_it_changes_nothing_and_goes_through_forks(train) -> None:
    assert train("qat=none", *ASKED, "run_name=trunk", "fork.keep_steps=[6]").code == 0
    arm = ("qat=int4", "qat.start_step=6")
    assert train(*arm, *ASKED, "run_name=whole").code == 0
    assert train(*arm, *ASKED, "run_name=tail", "fork.run=trunk", "fork.step=6").code == 0
    assert points("tail") == points("whole")
    assert train(*arm, "run_name=without").code == 0
    assert not (RUNS / "without" / CURVE).exists()
    files = [(RUNS / name / "artifact.qat").read_bytes() for name in ("whole", "without")]
    assert files[0] == files[1]


def test_means_over_runs() -> None:
    def row(bpb: float, snapped: float | str) -> dict[str, str]:
        return {
            "elapsed_seconds": "2.0",
            "val_bpb_float": f"{bpb}",
            "val_bpb_snapped": f"{snapped}",
        }

    found = validation_curve([[row(2.0, ""), row(1.0, 1.5)], [row(3.0, ""), row(2.0, 1.7)]])
    assert found == {
        "val_seconds": [2.0, 2.0], "val_bpb": [2.5, 1.5], "val_bpb_snapped": [None, 1.6],
    }  # fmt: skip
