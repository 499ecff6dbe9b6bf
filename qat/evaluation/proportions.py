"""Shares of right answers: how sure one is (Wilson 1927), and whether two differ (McNemar 1947).

Both are exact or near it for small counts and shares near 1, where the usual normal interval is
empty or passes 1. McNemar's test looks at the questions that just one of two models got right: if
the models are equally good, each of them is a toss of a coin.
"""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a share at a confidence level; without trials it may be anything: (0.0, 1.0)."""
    if not trials:
        return 0.0, 1.0
    found = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models are equally good, from the numbers of questions that only
    the first and only the second got right; 1.0 if there is none."""
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
