"""benchmarks/growth.py: slopes, what is not run, and goals that can be missed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth

WEIGHTS = {"2.6M": 2_600_000, "17M": 17_000_000, "124M": 124_000_000, "350M": 350_000_000}


def test_sizes_are_what_they_are_called() -> None:
    for size, spec in growth.SIZES.items():
        assert growth.num_weights(spec) == pytest.approx(WEIGHTS[size], rel=0.02)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_a_power_has_its_slope(power: float) -> None:
    assert growth.slope(3 * 8**power, 3, 8, 0.0) == pytest.approx(power)
    assert growth.slope(3 * 8**power, 3, 8, 4.0) is None


def row(seconds: float, peak_bytes: int) -> growth.Row:
    return {"name": "read", "seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak_bytes}


def rows(monkeypatch: pytest.MonkeyPatch, power: float, copies: float) -> list[growth.Row]:
    """Of a part that takes 1 s for 17 M weights."""

    def measured(_part: str, size: str, *_: object) -> list[growth.Row]:
        weights = growth.num_weights(growth.SIZES[size])
        return [row((weights / WEIGHTS["17M"]) ** power, int(4 * copies * weights))]

    monkeypatch.setattr(growth, "measured", measured)
    of_part = growth.Growth("file", limit_seconds=20.0)
    return [found for size in growth.SIZES for found in of_part.rows(size, Path())]


def test_what_grows_as_the_weights_reaches_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(monkeypatch, 1.0, 2.5)
    assert [f.get("seconds_slope") for f in found[1:3]] == pytest.approx([1.0, 1.0])
    assert found[-1]["not_run"] == pytest.approx(20.8, rel=0.02)  # over the limit
    assert growth.goals(found) == []
    assert "not run: it would take about 21 s" in growth.line_of(found[-1])


def test_missed_goals_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert growth.goals(rows(monkeypatch, 1.2, 2.5)) == [
        "read at 17M: seconds grow with slope 1.20", "read at 124M: seconds grow with slope 1.20",
    ]  # fmt: skip
    assert growth.goals(rows(monkeypatch, 1.0, 3.2)) == [
        f"read at {size}: peak 3.20 times the float32 weights" for size in ("124M",)
    ]


@pytest.mark.slow
def test_a_part_in_its_process(tmp_path: Path) -> None:
    found = {r["name"]: r for r in growth.measured("snap", "2.6M", tmp_path, 120)}
    assert set(found) >= {"plan", "snap"}
    weights = growth.num_weights(growth.SIZES["2.6M"])
    assert 4 * weights < found["snap"]["peak_bytes"] < 16 * weights
    assert found["snap"]["seconds"] > 0
