"""The best share of QAT in a run, as a published law has it, to stand beside what was measured.

Dremov et al., "Compute-Optimal Quantization-Aware Training" (arXiv 2509.22935), 757 runs of 86 M to
2.2 B weights on 1 to 6 bits: the share grows with the tokens per byte of the quantized parameters,
whatever these are made of. Their fit of it, with a mean error of 0.09; models here are far smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

A = 6.7297
RESAMPLES = 10_000


def predicted_share(tokens_per_parameter_byte: float) -> float:
    """0 where there is less than a token a byte: the fit says nothing there."""
    log = math.log(tokens_per_parameter_byte) if tokens_per_parameter_byte > 0 else 0.0
    return math.exp(-A / log) if log > 0 else 0.0


@dataclass(frozen=True)
class BestShare:
    """Of the arms that differ in when QAT starts; ``low`` and ``high``: 95 % of resampled seeds,
    None with one seed."""

    share: float
    low: float | None
    high: float | None
    predicted: float
    tokens_per_parameter_byte: float


def best_share(
    by_share: Mapping[float, Sequence[float]], tokens_per_parameter_byte: float
) -> BestShare:
    """``by_share``: share of QAT -> val_bpb by seed, in one order for all shares."""
    shares = list(by_share)
    scores = np.array([by_share[share] for share in shares])  # (shares, seeds)
    seeds = scores.shape[1]
    predicted = predicted_share(tokens_per_parameter_byte)
    best = shares[int(scores.mean(1).argmin())]
    if seeds < 2:
        return BestShare(best, None, None, predicted, tokens_per_parameter_byte)
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    winners = np.array(shares)[scores[:, drawn].mean(2).argmin(0)]
    low, high = np.quantile(winners, [0.025, 0.975], method="inverted_cdf").tolist()
    return BestShare(best, low, high, predicted, tokens_per_parameter_byte)
