"""How the study report writes numbers.

bpb with 5 decimals; differences in mbpb, thousandths of a bit per byte, with 2; p with 2
significant digits and never as 0; what was not measured as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from qat.study.findings import Ledger
from qat.study.significance import Effect

NOTHING = "–"
LEAST_P = 1e-4  # a t over a few seeds is not that sure of its tail


def bpb(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.5f}"


def difference_bpb(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.5f}"


def difference_mbpb(value: float) -> str:
    return f"{1000 * value:+,.2f}"


def p(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"< {LEAST_P:.0e}".replace("e-0", "e-") if value < LEAST_P else f"{value:#.2g}"


def count(value: float | None) -> str:
    """Bytes, steps, seeds."""
    return NOTHING if value is None else f"{value:,.0f}"


def fixed(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def bounds(low: float | None, high: float | None, decimals: int = 5) -> str:
    """An interval in brackets; nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def mean_and_spread(values: Sequence[float]) -> str:
    """bpb over seeds: mean and standard deviation."""
    if not values:
        return NOTHING
    return bpb(mean(values)) + (f" ± {stdev(values):.5f}" if len(values) > 1 else "")


def rounded_parts(parts: Sequence[float], total: float) -> list[int]:
    """Whole numbers nearest the parts that add up to the one nearest ``total``, their sum: what
    rounding down leaves goes to the largest remainders, one each. ValueError if it is not their
    sum."""
    below = [math.floor(part) for part in parts]
    left = round(total) - sum(below)
    if not 0 <= left <= len(parts):
        raise ValueError(f"{parts} do not add up to {total}")
    by_remainder = sorted(range(len(parts)), key=lambda at: below[at] - parts[at])
    for at in by_remainder[:left]:
        below[at] += 1
    return below


def ledger_parts(ledger: Ledger) -> tuple[Effect, ...]:
    return ledger.throughput, ledger.training, ledger.gap


def ledger_mbpb(ledger: Ledger) -> list[str]:
    """Throughput, training, gap and total in mbpb; as written, the first three add up to the
    last."""
    hundredths = [100_000 * part.mean for part in ledger_parts(ledger)]
    whole = rounded_parts(hundredths, 100_000 * ledger.total.mean)
    return [f"{part / 100:+,.2f}" for part in (*whole, sum(whole))]
