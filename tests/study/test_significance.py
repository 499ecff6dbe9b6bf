"""Verdicts over seeds: against scipy, against simulation, and what they must never claim."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qat.study.significance import BAR_NATS, Verdict, bar_in_bpb, holm, verdict

SEED_STD, NOISE_STD = 0.0008, 0.0005  # between seeds, and what pairing does not cancel


def study(random: np.random.Generator, effect: float, count: int) -> Verdict:
    """A study whose arm has a known constant added to its bpb."""
    seeds = 1.2 + SEED_STD * random.standard_normal(count)
    arm, baseline = (
        seeds + shift + NOISE_STD * random.standard_normal(count) for shift in (effect, 0.0)
    )
    return verdict(arm.tolist(), baseline.tolist(), 0.003)


@pytest.mark.slow
def test_identical_arms_are_called_equal() -> None:
    """In 93 to 97 of 100 studies, at level 0.05."""
    random = np.random.default_rng(8)
    found = [study(random, 0.0, 5) for _ in range(1_000)]
    equal = sum(v.p_value > 0.05 for v in found)
    assert 930 <= equal <= 970
    covered = sum(v.low < 0 < v.high for v in found)
    assert covered == equal
    assert sum(v.p_over_bar < 0.05 for v in found) == 0


@pytest.mark.parametrize(
    "effect", [-0.004, *(pytest.param(e, marks=pytest.mark.slow) for e in (-0.001, 0.002))]
)
def test_a_planted_effect_is_found_with_its_size(effect: float) -> None:
    random = np.random.default_rng(3)
    found = [study(random, effect, 5) for _ in range(400)]
    assert np.mean([v.mean for v in found]) == pytest.approx(effect, abs=1e-4)
    covered = np.mean([v.low < effect < v.high for v in found])
    assert 0.92 < covered < 0.98
    called = np.mean([v.p_value < 0.05 for v in found])
    spread = NOISE_STD * math.sqrt(2)
    shift, critical = effect / (spread / math.sqrt(5)), stats.t.ppf(0.975, 4)
    power = stats.nct.sf(critical, 4, shift) + stats.nct.cdf(-critical, 4, shift)
    assert called == pytest.approx(power, abs=0.06)
    # Beyond the bar of 0.003 only the first effect is.
    is_beyond = bool(np.mean([v.p_over_bar < 0.05 for v in found]) > 0.4)
    assert is_beyond == (effect == -0.004)


def test_a_constant_difference_leaves_no_doubt() -> None:
    v = verdict([1.1, 1.2, 1.3], [1.0, 1.1, 1.2], 0.003)
    assert v.mean == pytest.approx(0.1)
    assert v.p_value < 1e-12
    same = verdict([1.0, 1.1], [1.0, 1.1], 0.003)
    assert (same.mean, same.p_value, same.p_over_bar, same.seeds_needed) == (0.0, 1.0, 1.0, None)


def test_one_seed_says_nothing_but_its_difference() -> None:
    v = verdict([1.0], [1.5], 0.003)
    assert v.mean == -0.5
    assert v.bar_bpb == 0.003
    assert v.num_seeds == 1
    others = set(vars(v)) - {"mean", "num_seeds", "bar_bpb"}
    assert all(getattr(v, name) is None for name in others)


scores = st.lists(st.tuples(st.floats(1, 2), st.floats(1, 2)), min_size=2, max_size=12)


@given(scores)
def test_the_ts_are_scipys(pairs: list[tuple[float, float]]) -> None:
    arm, baseline = (list(values) for values in zip(*pairs, strict=True))
    differences = np.subtract(arm, baseline)
    if differences.std() < 1e-9 or np.std(arm) < 1e-9 or np.std(baseline) < 1e-9:
        return  # scipy warns of lost digits
    v = verdict(arm, baseline, 0.01)
    paired = stats.ttest_rel(arm, baseline)
    assert v.p_value == pytest.approx(paired.pvalue, rel=1e-6, abs=1e-12)
    assert (v.low, v.high) == pytest.approx(tuple(paired.confidence_interval(0.95)), abs=1e-9)
    assert v.p_welch == pytest.approx(
        stats.ttest_ind(arm, baseline, equal_var=False).pvalue, rel=1e-6, abs=1e-12
    )
    over = stats.ttest_1samp(differences, -0.01, alternative="less")
    assert v.p_over_bar == pytest.approx(over.pvalue, rel=1e-6, abs=1e-12)
    assert v.low <= v.mean <= v.high
    assert differences.min() - 1e-12 <= v.bootstrap_low <= v.bootstrap_high


@pytest.mark.slow
def test_what_so_many_seeds_would_find_they_find() -> None:
    random = np.random.default_rng(5)
    v = study(random, -0.001, 6)
    spread = NOISE_STD * math.sqrt(2)
    found = np.mean([
        stats.ttest_1samp(v.detectable + spread * random.standard_normal(6), 0).pvalue < 0.05
        for _ in range(1_500)
    ])  # fmt: skip
    # ``detectable`` is for the spread that the study saw, near the true one.
    assert 0.3 < found < 1.0
    exact = verdict([0.001, -0.001, 0.001, -0.001], [0.0] * 4, 0.003)
    spread = np.std([0.001, -0.001, 0.001, -0.001], ddof=1)
    hits = np.mean([
        stats.ttest_1samp(exact.detectable + spread * random.standard_normal(4), 0).pvalue < 0.05
        for _ in range(2_000)
    ])  # fmt: skip
    assert hits == pytest.approx(0.8, abs=0.03)
    # As many seeds as are needed for a difference find it, and one fewer does not.
    v = verdict([0.0, 0.001, 0.0015, 0.0005], [0.0] * 4, 0.003)
    n, spread = v.seeds_needed, float(np.std([0.0, 0.001, 0.0015, 0.0005], ddof=1))
    for count, enough in ((n, True), (n - 1, False)):
        hits = np.mean([
            stats.ttest_1samp(v.mean + spread * random.standard_normal(count), 0).pvalue < 0.05
            for _ in range(4_000)
        ])  # fmt: skip
        assert bool(hits > 0.79) == enough


def test_the_bar_in_bits_per_byte() -> None:
    """At 2.44 bytes per token, as sp1024 has them on FineWeb, it is 0.00296."""
    loss, bytes_per_token = 2.0, 2.4369
    bpb = loss / math.log(2) / bytes_per_token
    assert bar_in_bpb(bpb, loss) == pytest.approx(0.00296, abs=1e-5)
    assert bar_in_bpb(bpb, loss) == pytest.approx(BAR_NATS / math.log(2) / bytes_per_token)


def test_what_is_no_pair_is_refused() -> None:
    for arm, baseline in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="not pairs"):
            verdict(arm, baseline, 0.003)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if every set that holds it is, each by Bonferroni."""
    everyone = range(len(p_values))
    sets = [s for size in everyone for s in combinations(everyone, size + 1)]
    closed = [
        max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if at in s)
        for at in everyone
    ]
    assert holm(p_values) == pytest.approx(closed)
