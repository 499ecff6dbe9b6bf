"""Runs outside a study: which are put together, and which seeds are named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qat.report.report_task import verdict_lines
from qat.runs.result import Result
from qat.settings.schema import StudySettings
from qat.study.files import ArmRun, StudyFiles
from qat.study.find_out import best_shares, find_out_runs
from qat.study.findings import Findings
from qat.study.law import BestShare
from qat.study.significance import as_line, verdict
from qat.study.study import Study
from tests.conftest import result_of

MADE = {
    "seed": 0, "max_steps": 8, "budget_seconds": None, "limit_bytes": 9000, "grid": {"bits": 6},
    "plan": {}, "artifact": {"fill": False}, "averaging": {"kind": "none"},
    "qat": {"enabled": False, "to_bytes": False, "gradient": "identity"},
}  # fmt: skip
QAT = MADE["qat"] | {"enabled": True}


class Folder:
    """Run folders whose rows are made up; all store themselves on one grid."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, []
        path.mkdir(exist_ok=True)

    def add(self, qat: str, seed: int, bpb: float | None, grid: str = "int6", **more: Any) -> None:
        settings = MADE | {"seed": seed} | ({} if qat == "none" else {"qat": QAT})
        settings |= more.pop("settings", {})
        row = {
            "run_name": f"r{len(self.runs):02}", "status": "finished", "exit_code": 0,
            "error": None, "arm": None, "seed": seed, "profile": "laptop", "qat": qat,
            "grid": grid, "hardware": "h", "commit": "c", "data": None, "limit_bytes": 9000,
            "val_bpb_float": bpb, "val_bpb_artifact": bpb, "val_loss_artifact": bpb and 2 * bpb,
            "settings": settings,
        } | more  # fmt: skip
        self.runs.append(self.path / row["run_name"])
        self.runs[-1].mkdir()
        Result(**row).write(self.runs[-1])

    def pair(self, seed: int, bpb: float, delta: float, **more: Any) -> None:
        """A run and its baseline."""
        self.add("none", seed, bpb - delta, **more)
        self.add("int6", seed, bpb, **more)

    @property
    def found(self) -> Findings:
        return find_out_runs(self.runs, Console(quiet=True))

    @property
    def lines(self) -> list[str]:
        return verdict_lines(self.found)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_an_arm_is_its_seeds(folder: Folder) -> None:
    for seed, bpb, delta in ((1, 1.20, -0.01), (2, 1.22, -0.02), (3, 1.21, -0.03)):
        folder.pair(seed, bpb, delta)
    folder.add("int6", 4, 1.3)
    (line,) = folder.lines
    assert line.startswith("int6 on int6 (seeds 1, 2, 3): -0.02000 bpb against none")
    assert line.endswith(as_line(verdict([1.20, 1.22, 1.21], [1.21, 1.24, 1.24], 0.0025)))
    p = float(re.search(r"p = (\S+) paired", line)[1])
    assert p == pytest.approx(0.074, abs=0.001)  # t = -0.02 / (0.01 / sqrt 3), 2 degrees
    differs = folder.found.rows[-1]["note"]
    assert differs == "no baseline in this report: r00 differs in seed"


def test_other_settings_make_another_arm(folder: Folder) -> None:
    for seed in (1, 2):
        for steps in (8, 9):
            folder.pair(seed, 1.2 + seed / 100, -0.01 * seed, settings={"max_steps": steps})
    first, second = folder.lines
    assert first.startswith("int6 on int6 (seeds 1, 2): ")
    assert second.startswith("int6 on int6, max_steps = 9 (seeds 1, 2): ")


def test_one_seed_of_each_setting_has_no_verdict(folder: Folder) -> None:
    folder.pair(1, 1.2, -0.01)
    folder.pair(2, 1.2, -0.01, settings={"max_steps": 9})
    assert folder.lines == []


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path) -> None:
    lines = []
    for name, of_seed_1 in (("once", (1.20,)), ("twice", (1.19, 1.21))):
        (tmp_path / name).mkdir()
        folder = Folder(tmp_path / name)
        folder.add("none", 1, 1.22)
        folder.add("none", 2, 1.26)
        for bpb in of_seed_1:
            folder.add("int6", 1, bpb)
        folder.add("int6", 2, 1.22)
        lines.append(folder.lines)
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


def test_failed_seeds_are_named(folder: Folder) -> None:
    folder.pair(1, 1.20, -0.01)
    folder.pair(2, 1.22, -0.02)
    failed = {"status": "failed", "error": "no such text", "data": {"val": "0"}}
    folder.add("int6", 7, None, **failed)
    folder.add("int4", 8, None, "int4", **failed)
    (line,) = folder.lines
    assert line.startswith("int6 on int6 (seeds 1, 2; failed: 7):")
    (folder.path / "died").mkdir()
    folder.runs.append(folder.path / "died")
    assert len(folder.lines) == 1
    assert folder.found.rows[-1]["status"] == "unfinished"


def test_a_seed_that_failed_once_and_ran_again_is_not_missing(folder: Folder) -> None:
    folder.pair(1, 1.20, -0.01)
    folder.add("int6", 1, None, status="failed", error="no disk")
    (int6,) = (t for t in folder.found.treatments if t.is_qat)
    assert int6.missing_seeds == {}
    assert int6.notes == {1: "a run of it was left out: no disk"}


def test_runs_of_other_code_are_pairs_with_a_note(folder: Folder) -> None:
    """And files that other code stored; what is not known is not said."""
    folder.pair(1, 1.2, -0.01, storing_code="a")
    folder.pair(2, 1.21, -0.02, storing_code=None)
    assert [row["note"] for row in folder.found.rows] == [""] * 4
    folder.add("none", 3, 1.2, commit="0123456789abc", storing_code="a")
    folder.add("int6", 3, 1.23, commit="fedcba9876543", storing_code="b")
    notes = {row["seed"]: row["note"] for row in folder.found.rows if row["qat"] == "int6"}
    assert notes == {
        1: "", 2: "", 3: "trained by commit fedcba987, r04 by 012345678; its file and that of r04 "
        "were stored by different code",
    }  # fmt: skip
    moved = "0123456789abc-dirty, then fedcba9876543"
    folder.add("none", 4, 1.2, commit="fedcba9876543", storing_code="a")
    folder.add("int6", 4, 1.23, commit=moved, storing_code="a")
    said = {row["seed"]: row["note"] for row in folder.found.rows if row["qat"] == "int6"}[4]
    assert said == "trained by commit 012345678-dirty, then fedcba987, r06 by fedcba987"
    (int6,) = (t for t in folder.found.treatments if t.alike)
    assert int6.notes == {3: notes[3], 4: said}
    assert [*int6.alike.by_seed] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("diffs", "note"),
    [
        (("+a = 1\n", "+a = 2\n"), "trained by 012345678 with other uncommitted changes than r00"),
        (("+a = 1\n", None), "trained by 012345678 with other uncommitted changes than r00"),
        (("+a = 1\n", "+a = 1\n"), ""),
        ((None, None), ""),  # nothing but new files
    ],
)
def test_two_dirty_trees_of_one_commit_are_one_code_if_their_changes_are(
    diffs: tuple[str | None, str | None], note: str, folder: Folder
) -> None:
    folder.pair(1, 1.2, -0.01, commit="0123456789abc-dirty")
    for run, diff in zip(folder.runs, diffs, strict=True):
        if diff is not None:
            (run / "dirty.diff").write_text(diff)
    assert folder.found.rows[-1]["note"] == note


def shares_of(folder: Folder, arms: dict[str, dict[str, Any]]) -> dict[str, BestShare]:
    """Of a study of arms with two seeds each: ``last``, the updates with QAT of 8, and settings."""
    for arm, changed in arms.items():
        more = {"steps": 8, "qat_steps": changed.pop("last"), "tokens_per_parameter_byte": 4.0}
        bpb = changed.pop("bpb")
        for seed in (1, 2):
            settings = {"qat": QAT | {"start_step": 8 - more["qat_steps"]}} | changed
            folder.add("int6", seed, bpb + seed / 100, arm=arm, settings=settings, **more)
    study = Study("s", StudySettings(arms={arm: {} for arm in arms}), [*arms], [])
    runs = [replace(ArmRun.read(run), arm=result_of(run)["arm"]) for run in folder.runs]
    return best_shares(StudyFiles(runs, study, Console(quiet=True)))


def test_arms_of_one_share_are_taken_together(folder: Folder) -> None:
    """The better of them alone would win."""
    found = shares_of(folder, {
        "a": {"last": 2, "bpb": 1.2}, "b": {"last": 4, "bpb": 1.4}, "c": {"last": 6, "bpb": 1.3},
        "again": {"last": 4, "bpb": 1.1},
    })  # fmt: skip
    assert {grid: best.share for grid, best in found.items()} == {"int6": 0.25}


def test_each_kind_of_arm_has_a_best_share_of_its_own(folder: Folder) -> None:
    """The first arm of a grid, of another kind, hides none of them."""
    ema = {"averaging": {"kind": "ema"}}
    found = shares_of(folder, {
        "ema": {"last": 4, "bpb": 1.0} | ema,
        "a": {"last": 2, "bpb": 1.2}, "b": {"last": 4, "bpb": 1.3}, "c": {"last": 6, "bpb": 1.1},
    })  # fmt: skip
    assert {grid: best.share for grid, best in found.items()} == {"int6": 0.75}
    found = shares_of(Folder(folder.path / "n"), {
        "a": {"last": 2, "bpb": 1.2}, "b": {"last": 4, "bpb": 1.3}, "c": {"last": 6, "bpb": 1.1},
        "d": {"last": 2, "bpb": 1.2} | ema, "e": {"last": 4, "bpb": 1.0} | ema,
        "f": {"last": 6, "bpb": 1.1} | ema,
    })  # fmt: skip
    assert {grid: best.share for grid, best in found.items()} == {
        "int6": 0.75, "int6, averaging.kind = ema": 0.5,
    }  # fmt: skip
