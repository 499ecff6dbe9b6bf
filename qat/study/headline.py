"""A study's verdict in a few sentences: what its arms gained or lost, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from qat.study.findings import Comparison, Interval, Ledger, Treatment

Effects = Sequence[tuple[str, Interval]]


def headline_of(treatments: Sequence[Treatment], ledgers: Sequence[Ledger]) -> str:
    """QAT stored as the baseline is, as if it took no time, and against as many bytes; then what
    changed without QAT."""
    alike = [(t, _interval(t.alike)) for t in treatments if t.alike is not None]
    measured = [(ledger.name, ledger.at_equal_steps) for ledger in ledgers if ledger.is_measured]
    as_large = [(t.name, _interval(t.equal_bytes)) for t in treatments if t.equal_bytes is not None]
    sentences: list[tuple[str, Effects]] = [
        ("At equal wallclock and stored alike, QAT", [(t.name, i) for t, i in alike if t.is_qat]),
        ("At equal steps, as if it took no time, it", measured),
        ("Against a baseline that the solver fits to as many bytes, it", as_large),
        ("Without QAT, a change", [(t.name, i) for t, i in alike if not t.is_qat]),
    ]
    said = [f"{start} {_sorted_out(effects)}." for start, effects in sentences if effects]
    return " ".join(said) or "No arm has a baseline to compare with."


def _interval(comparison: Comparison) -> Interval:
    v = comparison.verdict
    return Interval(v.mean, v.low, v.high)


def _sorted_out(effects: Effects) -> str:
    """Which pay, which cost, which are not decided at 95 %."""
    pays: list[str] = []
    costs: list[str] = []
    undecided: list[str] = []
    for name, effect in effects:
        if effect.low is None or effect.high is None or effect.low <= 0.0 <= effect.high:
            of_its_kind = undecided
        else:
            of_its_kind = pays if effect.mean < 0.0 else costs
        of_its_kind.append(f"{name} ({_in_mbpb(effect)})")
    kinds = [("pays for", pays), ("costs with", costs), ("is undecided for", undecided)]
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in kinds if names)


def _in_mbpb(effect: Interval) -> str:
    if effect.low is None or effect.high is None:
        return f"{1000 * effect.mean:+.1f} mbpb, one seed"
    mean, low, high = (f"{1000 * bpb:+.1f}" for bpb in (effect.mean, effect.low, effect.high))
    return f"{mean} mbpb, 95 % {low} to {high}"
