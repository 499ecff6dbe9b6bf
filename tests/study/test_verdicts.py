"""Which runs are put together, and which seeds are named."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qat.study.significance import as_line, verdict, verdict_lines


def row(seed: int, bpb: float, delta: float | None, **more: Any) -> dict[str, Any]:
    return {
        "arm": "int6 on int6", "design": "a", "seed": seed, "status": "finished",
        "val_bpb_artifact": bpb, "val_loss_artifact": 2 * bpb, "delta_bpb": delta,
    } | more  # fmt: skip


def test_an_arm_is_its_seeds() -> None:
    rows = [row(1, 1.20, -0.01), row(2, 1.22, -0.02), row(3, 1.21, -0.03), row(4, 1.3, None)]
    (line,) = verdict_lines(rows)
    assert line.startswith("int6 on int6 (seeds 1, 2, 3): -0.02000 bpb against none")
    assert line.endswith(as_line(verdict([1.20, 1.22, 1.21], [1.21, 1.24, 1.24], 0.0025)))
    p = float(re.search(r"p = (\S+) paired", line)[1])
    assert p == pytest.approx(0.074, abs=0.001)  # t = -0.02 / (0.01 / sqrt 3), 2 degrees


def test_other_settings_make_another_arm() -> None:
    rows = [row(s, 1.2 + s / 100, -0.01 * s, design=d) for s in (1, 2) for d in ("a", "b")]
    assert len(verdict_lines(rows)) == 2
    assert verdict_lines([row(1, 1.2, -0.01), row(2, 1.2, -0.01, design="b")]) == []


def test_a_seed_that_ran_twice_counts_once() -> None:
    once = [row(1, 1.20, -0.02), row(2, 1.22, -0.04)]
    twice = [row(1, 1.19, -0.01), row(1, 1.21, -0.03), row(2, 1.22, -0.04)]
    assert verdict_lines(once) == verdict_lines(twice)


def test_failed_seeds_are_named() -> None:
    rows = [row(1, 1.20, -0.01), row(2, 1.22, -0.02)]
    failed = row(7, 0.0, None, status="failed")
    other = row(8, 0.0, None, status="failed", arm="int4 on int4")
    (line,) = verdict_lines([*rows, failed, other])
    assert line.startswith("int6 on int6 (seeds 1, 2; failed: 7):")
    without = {"arm": "?", "run_name": "died", "status": "unfinished", "exported": False}
    assert len(verdict_lines([*rows, without])) == 1
