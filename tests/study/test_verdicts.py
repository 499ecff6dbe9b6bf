"""Runs outside a study: which are put together, and which seeds are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qat.report.report_task import verdict_lines
from qat.runs.result import Result
from qat.study.find_out import find_out_runs
from qat.study.findings import Findings
from qat.study.significance import as_line, verdict

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
