"""Against the closed formula and an exact sum of fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.analysis.intervals import mcnemar_exact, wilson_interval


@given(st.integers(1, 3_000), st.data())
def test_wilson_is_its_formula(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    z = 1.959963984540054  # 97.5 % point of the normal distribution
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z / (1 + z * z / trials) * math.sqrt(spread)
    found = wilson_interval(successes, trials)
    assert found == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert 0.0 <= found[0] <= share <= found[1] <= 1.0


def test_wilson_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    low, high = wilson_interval(5, 10, level=0.5)
    assert 0.3 < low < high < 0.7
    for successes, trials in ((-1, 10), (11, 10)):
        with pytest.raises(ValueError, match=f"{successes} of 10 is no share"):
            wilson_interval(successes, trials)


@given(st.integers(0, 150), st.integers(0, 150))
def test_mcnemar_is_the_sum_of_a_fair_coin(only_first: int, only_second: int) -> None:
    flips = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(Fraction(math.comb(flips, k), 2**flips) for k in range(fewer + 1))
    assert mcnemar_exact(only_first, only_second) == pytest.approx(float(min(1, 2 * tail)))
    assert mcnemar_exact(only_first, only_second) == mcnemar_exact(only_second, only_first)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(7, 7) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
