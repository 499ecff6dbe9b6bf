"""Rate, switch and stop by step and by clock."""

from __future__ import annotations

import pytest

from qat.training.schedule import Schedule


def schedule(**changes) -> Schedule:
    values = {
        "budget_seconds": None, "max_steps": None, "warmdown_steps": 30, "momentum_start": 0.85,
        "momentum_end": 0.95, "momentum_warmup_steps": 500,
    }  # fmt: skip
    return Schedule(**(values | changes))


def test_by_steps_the_rate_is_one_then_falls_to_one_step_before_zero() -> None:
    s = schedule(max_steps=60)
    assert [s.rate(step, 0.0) for step in (0, 29, 30)] == [1.0, 1.0, 1.0]
    assert s.rate(31, 0.0) == pytest.approx(29 / 30)
    assert s.rate(59, 0.0) == pytest.approx(1 / 30)


def test_a_warmdown_longer_than_the_run_decays_from_the_start() -> None:
    assert schedule(max_steps=10).rate(0, 0.0) == pytest.approx(10 / 30)


def test_by_clock_the_warmdown_is_steps_at_the_measured_speed() -> None:
    s = schedule(budget_seconds=600.0, warmdown_steps=1200)
    assert s.rate(0, 0.0) == 1.0
    # 50 ms a step: 1200 steps are 60 s.
    assert s.rate(10_000, 500.0) == 1.0
    assert s.rate(10_800, 540.0) == pytest.approx(1.0)
    assert s.rate(11_400, 570.0) == pytest.approx(0.5)
    assert s.rate(12_000, 601.0) == 0.0


def test_a_fraction_of_the_run_by_clock_or_steps_down_to_a_floor() -> None:
    by_clock = schedule(budget_seconds=100.0, warmdown_steps=None, warmdown_fraction=0.4, floor=0.1)
    rates = [by_clock.rate(7, t) for t in (0.0, 60.0, 80.0, 100.0, 130.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    by_steps = schedule(max_steps=10, warmdown_steps=None, warmdown_fraction=1.0)
    assert [by_steps.rate(step, 0.0) for step in (0, 5)] == [1.0, 0.5]
    assert schedule(max_steps=60, floor=0.2).rate(45, 0.0) == pytest.approx(0.6)


def test_always_decaying_by_clock_is_the_baselines_rule() -> None:
    """20,000 warmdown steps, 13,780 of them fit into 600 s: down from 0.69 (PR 145)."""
    s = schedule(budget_seconds=600.0, warmdown_steps=20_000)
    step_seconds = 600.0 / 13_780
    for step in (1, 1000, 13_000):
        elapsed = step * step_seconds
        assert s.rate(step, elapsed) == pytest.approx((600 - elapsed) / (20_000 * step_seconds))


def test_momentum_grows_to_its_end() -> None:
    s = schedule(max_steps=1)
    assert s.momentum(0) == 0.85
    assert s.momentum(250) == pytest.approx(0.90)
    assert s.momentum(500) == s.momentum(9999) == 0.95
    assert schedule(max_steps=1, momentum_warmup_steps=0).momentum(0) == 0.95


def test_start_by_step_by_fraction_and_never() -> None:
    by_step = schedule(max_steps=12, start_step=5)
    assert [by_step.qat_starts(step, 0.0) for step in (0, 4, 5, 11)] == [False, False, True, True]
    by_clock = schedule(budget_seconds=100.0, start_fraction=0.5)
    assert [by_clock.qat_starts(7, t) for t in (0.0, 49.9, 50.0)] == [False, False, True]
    assert schedule(max_steps=1, start_step=0).qat_starts(0, 0.0)
    assert not schedule(max_steps=12).qat_starts(11, 0.0)


def test_the_nearer_limit_ends_the_run() -> None:
    s = schedule(budget_seconds=10.0, max_steps=100)
    assert s.progress(50, 2.0) == 0.5
    assert s.progress(50, 10.0) >= 1.0
    assert s.last_step(0.05) == 100
    assert s.last_step(1.0) == 10


def test_start_by_rate_stop_and_ramp() -> None:
    s = schedule(max_steps=60, start_lr_scale=0.5, stop_step=50, ramp_steps=3)
    assert not s.qat_starts(44, 0.0)
    assert s.qat_starts(45, 0.0)
    assert [s.qat_stopped(step) for step in (49, 50)] == [False, True]
    assert [s.blend(n) for n in (0, 1, 2, 3, 9)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(max_steps=1).blend(0) == 1.0
    assert s.asks_for_qat
    assert not schedule(max_steps=1).asks_for_qat
