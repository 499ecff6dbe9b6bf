"""The search for a zoom, on sizes that jump, saturate or never fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.budget.search import REACH, TRIALS, WINDOW, Trial, fill

OCTAVE = 100_000.0


def search(
    size_at: Callable[[float], float], budget: float, reach: float = REACH
) -> tuple[Trial[str], int]:
    """What is found, and after how many files beside the first."""
    places = []

    def trial_at(log2_zoom: float) -> Trial[str]:
        places.append(log2_zoom)
        return Trial(log2_zoom, size_at(log2_zoom), f"at {log2_zoom}")

    found = fill(trial_at, Trial(0.0, size_at(0.0), "first"), OCTAVE, budget, WINDOW, reach)
    assert found.made == ("first" if found.log2_zoom == 0.0 else f"at {found.log2_zoom}")
    assert found.num_bytes == size_at(found.log2_zoom)
    assert all(abs(place) <= reach for place in places)
    return found, len(places)


@given(st.floats(0.2, 1.2), st.floats(-0.5, 0.5), st.integers(0, 10_000))
def test_sizes_that_jump_a_little_end_in_the_window(slope: float, off: float, seed: int) -> None:
    """By half the window's width, without rhyme; and octaves bring less or more than expected."""
    jumps = np.random.default_rng(seed).uniform(-1, 1, 4096) * (1 - WINDOW) / 4

    def size_at(log2_zoom: float) -> float:
        jump = jumps[hash(log2_zoom) % len(jumps)]
        return (300_000 + (off - log2_zoom) * slope * OCTAVE) * (1 + jump)

    found, tried = search(size_at, 300_000)
    assert WINDOW * 300_000 <= found.num_bytes <= 300_000
    assert tried <= TRIALS


@given(st.floats(-9.0, 9.0), st.floats(0.05, 0.95))
def test_from_far_off_between_two_flat_ends(middle: float, share: float) -> None:
    """8 bits at the fine end, nothing but zeros at the coarse one."""

    def size_at(log2_zoom: float) -> float:
        return 1_000 + 8 * OCTAVE / (1 + 2.0 ** (log2_zoom - middle))

    budget = 1_000 + share * 8 * OCTAVE
    found, tried = search(size_at, budget, 15.0)
    assert WINDOW * budget <= found.num_bytes <= budget
    assert tried <= TRIALS


def test_with_the_right_slope_one_move_is_enough() -> None:
    found, tried = search(lambda zoom: 300_000 + (0.3 - zoom) * OCTAVE, 300_000)
    assert tried == 1
    assert found.log2_zoom == pytest.approx(0.3, abs=0.01)


def test_what_is_in_the_window_stays() -> None:
    found, tried = search(lambda zoom: 299_900 - zoom, 300_000)
    assert (found.made, tried) == ("first", 0)


def test_scales_held_back_by_8_bits_end_the_search() -> None:
    found, tried = search(lambda zoom: 200_000 - max(zoom, -0.1) * OCTAVE, 300_000)
    assert found.num_bytes == 210_000
    assert tried <= 4


def test_if_nothing_fits_it_is_the_smallest() -> None:
    found, _ = search(lambda zoom: 500_000 - zoom * OCTAVE, 300_000)
    assert found.log2_zoom == REACH
    assert found.num_bytes == 350_000


def test_a_jump_over_the_window_ends_below_it() -> None:
    found, tried = search(lambda zoom: 310_000 if zoom < math.pi / 10 else 290_000, 300_000)
    assert found.num_bytes == 290_000
    assert tried == TRIALS
