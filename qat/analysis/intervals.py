"""How sure is a change? A paired bootstrap over documents, and exact tests of shares.

Two models read the same tokens, so the change is taken token by token before anything is averaged.
Tokens of one document depend on each other; documents are what the text is a sample of, so whole
documents are drawn, with replacement. The interval is the percentile one (Efron & Tibshirani 1993,
chapter 13; Koehn 2004 for test sets of language): it assumes no shape of distribution.

Shares of right answers have Wilson's interval (1927) and McNemar's exact test (1947), which hold
for small counts and shares near 1. McNemar's looks at the questions that just one of two models got
right: if the models are equally good, each of them is a toss of a coin.

Left out: bias-corrected intervals, which a ratio of large sums does not need, and what another seed
of training would give: that is for pairs of runs (``qat/study``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

CHUNK_TOKENS = 1 << 20  # whose float64 copies are held at a time
# An effect carried by n flipped predictions is itself known to about 1 / sqrt(n), 20 % for 25. With
# fewer a handful of tokens decides, and the percentile interval is too narrow for so few.
MIN_FLIPS = 25


@dataclass(frozen=True)
class Interval:
    """An estimate and its bounds. ``low`` and ``high`` are None where documents are too few to say,
    ``estimate`` too where nothing was measured; ``num_documents`` had a denominator above zero."""

    estimate: float | None
    low: float | None
    high: float | None
    num_documents: int


def document_sums(values: np.ndarray, document_ids: np.ndarray, num_documents: int) -> np.ndarray:
    """Per-token ``values`` (N,) summed by document -> (num_documents,) float64.

    ``document_ids`` (N,) are integers from 0 to num_documents - 1. ValueError if one is not.
    """
    sums = np.zeros(num_documents)
    for first in range(0, len(values), CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        sums += np.bincount(document_ids[chunk], weights=values[chunk], minlength=num_documents)
    return sums


def paired_bootstrap(
    changes: np.ndarray,
    denominators: np.ndarray,
    seed: int,
    scale: float = 1.0,
    num_resamples: int = 2_000,
    level: float = 0.95,
) -> Interval:
    """The interval of ``scale * sum(changes) / sum(denominators)`` over resampled documents.

    ``changes`` (D,): of one document, what the second model has more than the first (nats, correct
    predictions); ``denominators`` (D,): its bytes or tokens, none negative. The bounds are None if
    fewer than two documents have a denominator, or so few that a resample drew none of them.
    Memory for a few arrays of D; 100,000 documents take seconds.
    """
    # Documents that add nothing to either sum (no token of a tier) would only empty resamples.
    counted = (changes != 0) | (denominators != 0)
    changes = changes[counted].astype(np.float64)
    denominators = denominators[counted].astype(np.float64)
    num_documents = int(np.count_nonzero(denominators))
    if not num_documents:
        return Interval(None, None, None, 0)
    estimate = scale * float(changes.sum() / denominators.sum())
    if num_documents < 2:
        return Interval(estimate, None, None, num_documents)
    generator = np.random.default_rng(seed)
    sums = np.empty((2, num_resamples))
    for k in range(num_resamples):
        drawn = generator.integers(0, len(changes), len(changes))
        sums[:, k] = changes[drawn].sum(), denominators[drawn].sum()
    if not sums[1].all():
        return Interval(estimate, None, None, num_documents)
    tail = (1.0 - level) / 2
    low, high = np.quantile(scale * sums[0] / sums[1], [tail, 1.0 - tail]).tolist()
    return Interval(estimate, low, high, num_documents)


def is_real(interval: Interval, num_flipped: int) -> bool:
    """Is it called an effect? Its interval excludes zero, and at least MIN_FLIPS predictions of the
    likeliest token differ between the two models."""
    if interval.low is None or interval.high is None:
        return False
    return (interval.low > 0.0 or interval.high < 0.0) and num_flipped >= MIN_FLIPS


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a share at a confidence level; without trials it may be anything: (0.0, 1.0).

    ValueError for more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= trials:  # scipy 1.18 gives NaN
        raise ValueError(f"{successes} of {trials} is no share")
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
