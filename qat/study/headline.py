"""A study's verdict in a sentence: what its arms gained or lost, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from qat.study.findings import Contrast, Ledger, Treatment
from qat.study.significance import Effect

Effects = Sequence[tuple[str, Effect]]


def headline_of(treatments: Sequence[Treatment], ledgers: Sequence[Ledger]) -> str:
    """QAT stored as the baseline is, as if it took no time, and against as many bytes; then what
    changed without QAT. Numbers of what is decided at 95 %."""
    alike = [(t, _interval(t.alike)) for t in treatments if t.alike is not None]
    measured = [(ledger.name, ledger.at_equal_steps) for ledger in ledgers if ledger.is_measured]
    as_large = [(t.name, _interval(t.equal_bytes)) for t in treatments if t.equal_bytes is not None]
    clauses: list[tuple[str, Effects]] = [
        ("at equal wallclock, stored alike, QAT", [(t.name, i) for t, i in alike if t.is_qat]),
        ("at equal steps it", measured),
        ("at equal bytes, against the solver's plan, it", as_large),
        ("without QAT a change", [(t.name, i) for t, i in alike if not t.is_qat]),
    ]
    said = [f"{start} {_sorted_out(effects)}" for start, effects in clauses if effects]
    sentence = "; ".join(said) or "no arm has a baseline to compare with"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _interval(comparison: Contrast) -> Effect:
    v = comparison.verdict
    return Effect(v.mean, v.low, v.high)


def _sorted_out(effects: Effects) -> str:
    """Which pay, which cost, which are not decided."""
    pays: list[str] = []
    costs: list[str] = []
    undecided: list[str] = []
    for name, effect in effects:
        if effect.low is None or effect.high is None:
            undecided.append(f"{name} ({1000 * effect.mean:+.1f} mbpb, one seed)")
        elif effect.low <= 0.0 <= effect.high:
            undecided.append(name)
        else:
            of_its_kind = pays if effect.mean < 0.0 else costs
            of_its_kind.append(f"{name} ({_in_mbpb(effect.mean, effect.low, effect.high)})")
    kinds = [("pays for", pays), ("costs with", costs), ("is undecided for", undecided)]
    return ", ".join(f"{verb} {_listed(names)}" for verb, names in kinds if names)


def _in_mbpb(*bounds: float) -> str:
    mean, low, high = (f"{1000 * bpb:+.1f}" for bpb in bounds)
    return f"{mean} mbpb, 95 % {low} to {high}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
