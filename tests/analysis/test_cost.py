"""Two models timed in turn: what the machine does meanwhile is not taken for the models' doing."""

from __future__ import annotations

import pytest
import torch

from qat.analysis import cost
from qat.analysis.cost import Calls, time_calls, time_in_turn

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine on which everything takes 2 % longer from call to call."""
    now = [0.0, 1.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    return now


def calls(clock: list[float], one: float, many: float) -> Calls:
    def take(seconds: float) -> None:
        clock[0] += seconds * clock[1]
        clock[1] *= 1.02

    return Calls(lambda: take(one), lambda: take(many), 8)


def test_a_machine_that_slows_down_makes_no_model_slower(clock: list[float]) -> None:
    same = calls(clock, 0.001, 0.004), calls(clock, 0.001, 0.004)
    one_after_another = [time_calls(of, 20, CPU).latency_ms.median for of in same]
    assert one_after_another[1] > 1.3 * one_after_another[0]
    speedup = time_in_turn(*same, 20, CPU)
    assert speedup.latency.median == pytest.approx(1 / 1.02)
    assert speedup.throughput.median == pytest.approx(1 / 1.02)


def test_a_model_that_is_faster_is_found_faster(clock: list[float]) -> None:
    speedup = time_in_turn(calls(clock, 0.001, 0.003), calls(clock, 0.002, 0.009), 5, CPU)
    assert speedup.latency.median == pytest.approx(2.0, rel=0.03)
    assert speedup.latency.lower_quartile == pytest.approx(2.0, rel=0.03)
    assert speedup.throughput.median == pytest.approx(3.0, rel=0.03)
