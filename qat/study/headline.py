"""A study's verdict in a sentence: what its QAT arms gained or lost, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from qat.study.findings import Comparison, Treatment
from qat.study.significance import LEVEL


def headline_of(treatments: Sequence[Treatment]) -> str:
    """Comparisons with an interval count; without any the sentence says so."""
    qat = [t for t in treatments if t.is_qat]
    rest = [t for t in treatments if not t.is_qat and t.alike is not None]
    said = []
    if alike := [(t.name, t.alike) for t in qat if t.alike is not None]:
        said.append(f"At equal wallclock, stored alike, {_sorted_out(alike, 'QAT')}")
    if as_large := [(t.name, t.equal_bytes) for t in qat if t.equal_bytes is not None]:
        said.append(
            "Against a baseline that the solver fits to as many bytes, "
            f"{_sorted_out(as_large, 'QAT')}"
        )
    if others := [(t.name, t.alike) for t in rest if t.alike is not None]:
        said.append(f"Without QAT, {_sorted_out(others, 'it')}")
    return " ".join(f"{sentence}." for sentence in said) or "No arm has a baseline to compare with."


def _sorted_out(found: Sequence[tuple[str, Comparison]], what: str) -> str:
    """Which are better, worse, undecided."""
    better, worse, undecided = [], [], []
    for name, comparison in found:
        v = comparison.verdict
        if v.p_value is None or v.p_value >= LEVEL:
            undecided.append(f"{name} ({_number(v.mean)}{_range(comparison)})")
        elif v.mean < 0:
            better.append(f"{name} ({_number(v.mean)}{_range(comparison)})")
        else:
            worse.append(f"{name} ({_number(v.mean)}{_range(comparison)})")
    said = [
        f"{what} {verb} {', '.join(names)}"
        for verb, names in (
            ("pays for", better),
            ("costs with", worse),
            ("makes no difference that these seeds can show for", undecided),
        )
        if names
    ]
    return "; ".join(said)


def _number(bpb: float) -> str:
    return f"{1000 * bpb:+.1f} mbpb"


def _range(comparison: Comparison) -> str:
    v = comparison.verdict
    if v.low is None or v.high is None:
        return ", one seed"
    return f", 95 % {1000 * v.low:+.1f} to {1000 * v.high:+.1f}"
