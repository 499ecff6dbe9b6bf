"""What several seeds say together: is an arm better than its baseline, and how sure is that?

Each seed gives one difference, artifact val_bpb of the arm less that of the baseline with the same
seed, so what a seed does to both cancels. Every started seed counts; who failed is named.

- Student's t over the differences: interval and two-sided p. Welch's t, which knows nothing of the
  pairs, beside it: where it is the smaller one, pairing cancelled nothing.
- One-sided p against the record bar of 0.005 nats per token: that the arm is better by more.
- A bootstrap over seeds, percentile, for readers who distrust normality. It is too narrow for few
  seeds (5 give 126 distinct resamples), so no verdict hangs on it.
- The least difference that so many seeds would find (power 0.8 at level 0.05), and how many seeds
  would find the one that was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats
from scipy.optimize import brentq

BAR_NATS = 0.005  # per token: what a record had to be better by
LEVEL, POWER = 0.05, 0.8
RESAMPLES = 10_000
MAX_SEEDS = 1_000  # beyond, nobody would run it


@dataclass(frozen=True)
class Effect:
    """Mean over seeds, its 95 % interval and two-sided p (None with one seed)."""

    mean: float
    low: float | None
    high: float | None
    p_value: float | None = None
    num_seeds: int = 1


@dataclass(frozen=True)
class Verdict:
    """Differences in bits per byte, arm - baseline: below 0 the arm is better.

    None where it cannot be said: all but the mean with one seed. ``seeds_needed`` is None too where
    ``MAX_SEEDS`` would not do.
    """

    num_seeds: int
    mean: float
    bar_bpb: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_welch: float | None = None
    p_over_bar: float | None = None  # that the arm is not better by more than the bar
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    detectable: float | None = None
    seeds_needed: int | None = None


def bar_in_bpb(val_bpb: float, val_loss: float) -> float:
    """``BAR_NATS`` per token in bits per byte, at the tokens per byte of the text scored."""
    return BAR_NATS * val_bpb / val_loss


def interval(values: Sequence[float]) -> Effect:
    """Student's."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Effect(mean, None, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    margin = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    p_value = _two_sided(mean, error, count - 1)
    return Effect(mean, mean - margin, mean + margin, p_value, count)


def verdict(arm: Sequence[float], baseline: Sequence[float], bar_bpb: float) -> Verdict:
    """``arm`` and ``baseline``: val_bpb by seed, in the same order. ValueError if they are not
    pairs."""
    if len(arm) != len(baseline) or not len(arm):
        raise ValueError(f"{len(arm)} and {len(baseline)} scores are not pairs")
    differences = np.asarray(arm, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return Verdict(1, mean, bar_bpb)
    spread = float(differences.std(ddof=1))
    error = spread / math.sqrt(count)
    around = interval(differences.tolist())
    resampled = np.random.default_rng(0).choice(differences, (RESAMPLES, count)).mean(1)
    bootstrap_low, bootstrap_high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2]).tolist()
    return Verdict(
        num_seeds=count,
        mean=mean,
        low=around.low,
        high=around.high,
        p_value=around.p_value,
        p_welch=_welch(arm, baseline),
        p_over_bar=_one_sided(mean + bar_bpb, error, count - 1),
        bar_bpb=bar_bpb,
        bootstrap_low=bootstrap_low,
        bootstrap_high=bootstrap_high,
        detectable=spread * _detectable(count),
        seeds_needed=_seeds_needed(mean, spread),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for there being so many, in the order given (Holm 1979): call those below a
    level real, and the chance of one false call among all stays below that level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, (len(p_values) - rank) * p_values[at])
        adjusted[at] = min(1.0, largest)
    return adjusted


def _two_sided(mean: float, error: float, freedom: int) -> float:
    if error == 0.0:  # equal in every seed: no doubt is left, or no difference
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def _one_sided(excess: float, error: float, freedom: int) -> float:
    """p of a difference below zero by chance, if it is none."""
    if error == 0.0:
        return 0.0 if excess < 0 else 1.0
    return float(stats.t.cdf(excess / error, freedom))


def _welch(arm: Sequence[float], baseline: Sequence[float]) -> float:
    if np.ptp(arm) == 0.0 and np.ptp(baseline) == 0.0:
        return 1.0 if arm[0] == baseline[0] else 0.0
    return float(stats.ttest_ind(arm, baseline, equal_var=False).pvalue)


# Not statsmodels, which brings pandas for these twenty lines; scipy has the distributions.
def _power(standardised: float, count: int) -> float:
    """Share of studies of ``count`` seeds that would call a difference of so many standard
    deviations one."""
    freedom = count - 1
    critical = float(stats.t.ppf(1 - LEVEL / 2, freedom))
    # t ** 2 is an F: scipy's noncentral t gives NaN for large differences.
    return float(stats.ncf.sf(critical**2, 1, freedom, standardised**2 * count))


@cache
def _detectable(count: int) -> float:
    """The least difference, in standard deviations, that is found with ``POWER``."""
    enough = 1.0
    while _power(enough, count) < POWER:
        enough *= 2
    return float(brentq(lambda d: _power(d, count) - POWER, 0.0, enough))


def _seeds_needed(mean: float, spread: float) -> int | None:
    if spread == 0.0:
        return 2 if mean else None
    found = bisect_left(
        range(2, MAX_SEEDS + 1), True, key=lambda n: _power(abs(mean) / spread, n) >= POWER
    )
    return found + 2 if found + 2 <= MAX_SEEDS else None


def as_line(v: Verdict) -> str:
    """A verdict of two seeds or more, in words."""
    needed = "more than 1,000" if v.seeds_needed is None else f"{v.seeds_needed:,}"
    return (
        f"{v.mean:+.5f} bpb against none (95 % {v.low:+.5f} to {v.high:+.5f}; bootstrap "
        f"{v.bootstrap_low:+.5f} to {v.bootstrap_high:+.5f}), p = {v.p_value:.2g} paired, "
        f"{v.p_welch:.2g} Welch; better by more than {BAR_NATS} nats ({v.bar_bpb:.5f} bpb): "
        f"p = {v.p_over_bar:.2g}; so many seeds find {v.detectable:.5f} bpb or more, and this "
        f"difference takes {needed}"
    )
