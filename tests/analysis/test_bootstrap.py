"""Intervals against scipy's bootstrap and against the truth of simulated texts."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from qat.analysis import intervals as bootstrap
from qat.analysis.intervals import MIN_FLIPS, Interval, document_sums, is_real, paired_bootstrap


def texts(num_documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Changes and lengths of documents; the true ratio is 1, so that a long one changes more."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(50, 3_000, num_documents).astype(np.float64)
    changes = lengths * (1.0 + generator.normal(0.0, 0.2, num_documents))
    return changes, lengths


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 4)), max_size=50),
    st.integers(1, 7),
)
def test_document_sums(tokens: list[tuple[float, int]], chunk_tokens: int) -> None:
    values = np.array([value for value, _ in tokens], dtype=np.float32)
    ids = np.array([document for _, document in tokens], dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "CHUNK_TOKENS", chunk_tokens)
        sums = document_sums(values, ids, 5)
    assert sums.dtype == np.float64
    expected = [sum(value for value, d in tokens if d == document) for document in range(5)]
    assert sums == pytest.approx(expected, abs=1e-9)


def test_a_document_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        document_sums(np.ones(2), np.array([0, 5]), 5)


def test_same_interval_as_scipy() -> None:
    changes, lengths = texts(60, seed=1)
    ours = paired_bootstrap(changes, lengths, seed=2, scale=3.0, num_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (changes, lengths),
        lambda a, b, axis=-1: 3.0 * a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(3),
    )
    assert ours.estimate == pytest.approx(3.0 * changes.sum() / lengths.sum())
    assert ours.low is not None
    assert ours.high is not None
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)
    assert ours.num_documents == 60
    narrower = paired_bootstrap(changes, lengths, seed=2, scale=3.0, level=0.5)
    assert narrower.low is not None
    assert narrower.high is not None
    assert narrower.high - narrower.low == pytest.approx(width * 0.6745 / 1.96, rel=0.1)


def test_95_percent_of_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(300):
        found = paired_bootstrap(*texts(80, seed), seed=seed, num_resamples=400)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_seeded() -> None:
    changes, lengths = texts(30, seed=1)
    assert paired_bootstrap(changes, lengths, 5) == paired_bootstrap(changes, lengths, 5)
    assert paired_bootstrap(changes, lengths, 5) != paired_bootstrap(changes, lengths, 6)


def test_too_few_documents_have_no_bounds() -> None:
    one = paired_bootstrap(np.array([3.0, 0.0]), np.array([2.0, 0.0]), seed=1, scale=2.0)
    assert one == Interval(3.0, None, None, 1)
    assert paired_bootstrap(np.zeros(4), np.zeros(4), seed=1) == Interval(None, None, None, 0)
    assert paired_bootstrap(np.zeros(0), np.zeros(0), seed=1) == Interval(None, None, None, 0)
    # Nats without bytes (empty documents) count; a resample of nothing else has no ratio.
    empty = paired_bootstrap(np.ones(9), np.array([1.0, 1, 0, 0, 0, 0, 0, 0, 0]), seed=1)
    assert empty == Interval(4.5, None, None, 2)


def test_documents_that_count_for_nothing_change_nothing() -> None:
    changes, lengths = texts(30, seed=1)
    padded = [np.concatenate([part, np.zeros(500)]) for part in (changes, lengths)]
    assert paired_bootstrap(*padded, seed=4) == paired_bootstrap(changes, lengths, seed=4)


def test_whole_numbers_are_divided_as_such() -> None:
    found = paired_bootstrap(np.array([1, 1, 1]), np.array([2, 2, 2]), seed=1)
    assert found == Interval(0.5, 0.5, 0.5, 3)


def test_a_diverged_model_is_no_effect() -> None:
    found = paired_bootstrap(np.array([1.0, np.nan, 2.0]), np.ones(3), seed=1)
    assert not is_real(found, 1_000)


def test_an_effect_needs_its_interval_and_its_flips() -> None:
    for low, high, real in ((0.1, 0.3, True), (-0.3, -0.1, True), (-0.1, 0.1, False)):
        assert is_real(Interval((low + high) / 2, low, high, 9), MIN_FLIPS) is real
    assert not is_real(Interval(0.2, 0.1, 0.3, 9), MIN_FLIPS - 1)
    assert not is_real(Interval(0.2, 0.0, 0.3, 9), MIN_FLIPS)
    assert not is_real(Interval(-0.2, -0.3, 0.0, 9), MIN_FLIPS)
    assert not is_real(Interval(0.2, None, None, 1), 1_000)


@pytest.mark.slow
def test_many_documents_take_seconds() -> None:
    start = time.monotonic()
    paired_bootstrap(*texts(100_000, seed=1), seed=1)
    assert time.monotonic() - start < 30
