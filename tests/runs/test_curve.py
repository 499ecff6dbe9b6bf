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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (("eval.curve_points=2", "eval.curve_tokens=256"), [3, 6, 12]),  # the trunk's, where it had
        (("eval.curve_points=4", "eval.curve_tokens=512"), [9, 12]),  # its points are of less text
    ],
    ids=["other points", "other text"],
)
def test_a_fork_has_the_points_of_its_trunk(train, asked: tuple[str, ...], steps: list) -> None:
    assert train("qat=none", *ASKED, "run_name=trunk", "fork.keep_steps=[6]").code == 0
    assert train(*asked, "run_name=tail", "fork.run=trunk", "fork.step=6").code == 0
    assert [int(step) for step, _, _ in points("tail")] == steps


def row(step: int, bpb: float, snapped: float | str = "") -> dict[str, str]:
    said = {"step": step, "elapsed_seconds": 2.0 * step, "val_bpb_float": bpb}
    return {name: f"{value}" for name, value in (said | {"val_bpb_snapped": snapped}).items()}


def test_means_over_runs() -> None:
    found = validation_curve([[row(4, 2.0), row(8, 1.0, 1.5)], [row(4, 3.0), row(8, 2.0, 1.7)]])
    assert found == {
        "val_seconds": [8.0, 16.0], "val_bpb": [2.5, 1.5], "val_bpb_snapped": [None, 1.6],
    }  # fmt: skip


def test_means_are_of_points_at_the_same_step() -> None:
    """One run has no points before its fork, one has more of them."""
    whole = [row(2, 5.0), row(4, 4.0), row(6, 3.0, 3.5), row(8, 2.0, 2.5)]
    found = validation_curve([whole, [row(6, 5.0, 5.5), row(8, 4.0, 4.5)]])
    assert found == {
        "val_seconds": [12.0, 16.0], "val_bpb": [4.0, 3.0], "val_bpb_snapped": [4.5, 3.5],
    }  # fmt: skip
    found = validation_curve([whole, [row(4, 6.0), row(8, 4.0, 4.5)]])
    assert found == {
        "val_seconds": [8.0, 16.0], "val_bpb": [5.0, 3.0], "val_bpb_snapped": [None, 3.5],
    }  # fmt: skip


def test_runs_of_the_clock_have_their_points_at_steps_of_their_own() -> None:
    """There a curve is read between its points."""
    found = validation_curve([[row(10, 4.0), row(20, 2.0)], [row(11, 4.0), row(22, 2.0)]])
    assert found["val_seconds"] == [22.0, 40.0]
    assert found["val_bpb"] == pytest.approx([(3.8 + 4.0) / 2, (2.0 + 2.0 + 4 / 11) / 2])
    assert found["val_bpb_snapped"] == [None, None]
    assert validation_curve([]) == {"val_seconds": [], "val_bpb": [], "val_bpb_snapped": []}
    apart = [[row(1, 2.0), row(2, 1.0)], [row(3, 2.0), row(4, 1.0)]]
    assert validation_curve(apart)["val_bpb"] == []
