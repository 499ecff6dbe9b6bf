"""A study's verdict in a few sentences: what its arms gained or lost, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from qat.study.findings import Comparison, Treatment
from qat.study.significance import LEVEL

Compared = list[tuple[str, Comparison]]


def headline_of(treatments: Sequence[Treatment]) -> str:
    """Arms with QAT, stored as the baseline and against as many bytes, then those without."""
    alike = [(t, t.alike) for t in treatments if t.alike is not None]
    as_large = [(t.name, t.equal_bytes) for t in treatments if t.equal_bytes is not None]
    sentences = [
        ("At equal wallclock and stored alike, QAT", [(t.name, c) for t, c in alike if t.is_qat]),
        ("Against a baseline that the solver fits to as many bytes, it", as_large),
        ("Without QAT, a change", [(t.name, c) for t, c in alike if not t.is_qat]),
    ]
    said = [f"{start} {_sorted_out(found)}." for start, found in sentences if found]
    return " ".join(said) or "No arm has a baseline to compare with."


def _sorted_out(found: Compared) -> str:
    """Which pay, which cost, which are not decided."""
    pays: list[str] = []
    costs: list[str] = []
    undecided: list[str] = []
    for name, comparison in found:
        v = comparison.verdict
        is_decided = v.p_value is not None and v.p_value < LEVEL
        of_its_kind = undecided if not is_decided else pays if v.mean < 0 else costs
        of_its_kind.append(f"{name} ({_in_mbpb(comparison)})")
    kinds = [("pays for", pays), ("costs with", costs), ("is undecided for", undecided)]
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in kinds if names)


def _in_mbpb(comparison: Comparison) -> str:
    v = comparison.verdict
    if v.low is None or v.high is None:
        return f"{1000 * v.mean:+.1f} mbpb, one seed"
    return f"{1000 * v.mean:+.1f} mbpb, 95 % {1000 * v.low:+.1f} to {1000 * v.high:+.1f}"
