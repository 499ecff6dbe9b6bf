"""What runs say together, as their report shows it: plain values, written to ``findings.json``.

A treatment is a way to train and a way to store: an arm, or an arm and one of the study's stores.
All differences are in bits per byte, treatment - reference: below 0 the treatment is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat.study.law import BestShare
from qat.study.significance import LEVEL, Effect, Verdict, holm


@dataclass(frozen=True)
class Contrast:
    """A treatment against a reference with the same seeds."""

    against: str  # the reference in words
    val_bpb: dict[int, float]  # of the reference, by seed
    total_bytes: dict[int, int]
    by_seed: dict[int, float]  # treatment - reference
    verdict: Verdict


@dataclass(frozen=True)
class Treatment:
    name: str
    arm: str
    store: str | None  # None: as the run itself stored it
    grid: str  # label; "" if no file says it
    is_qat: bool
    val_bpb: dict[int, float]  # of the artifact, by seed
    total_bytes: dict[int, int]  # artifact and code
    missing_seeds: dict[int, str]  # started and in no comparison, and why
    alike: Contrast | None  # the baseline stored in the same way; None for the baseline itself
    equal_bytes: Contrast | None  # the baseline stored by the solver in as many bytes
    # Of QAT as the run stored it: the baseline by each of the study's stores, on the same grid
    # where the store has none of its own. None fills a limit.
    by_store: dict[str, Contrast] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)  # by seed: what a reader should know of it


@dataclass(frozen=True)
class Ledger:
    """total = throughput + training + gap, in every seed and in the mean.

    Against the arm that differs in QAT alone: that of ``alike``, unless the study varies more.
    """

    name: str  # of the treatment
    is_measured: bool  # throughput from runs of equal steps; else estimated from the loss curve
    throughput: Effect  # steps lost to overhead
    training: Effect  # what fake quantization does to the float weights at equal steps
    gap: Effect  # change of the quantization gap
    total: Effect
    at_equal_steps: Effect  # training + gap: the total if QAT took no time
    basis: str  # in words: how throughput was found
    against: str = "none"  # the arm that shares all but QAT with it


@dataclass(frozen=True)
class Curve:
    """Training loss of an arm in bits per byte over its clock, averaged over seeds."""

    arm: str
    seconds: list[float]
    bpb: list[float]
    switch_seconds: float | None  # mean start of QAT
    val_bpb_float: float | None
    val_bpb_artifact: float | None
    # The validation curve, on a part of the text; snapped weights are scored while QAT is on.
    val_seconds: list[float] = field(default_factory=list)
    val_bpb: list[float] = field(default_factory=list)  # of float weights, as of the next line
    val_bpb_snapped: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Findings:
    name: str
    question: str
    headline: str  # the verdict in a sentence
    baseline: str  # name of its arm
    seeds: list[int]
    budget_seconds: float | None
    hardware: list[str]
    commits: list[str]
    commands: list[str]
    treatments: list[Treatment]
    ledgers: list[Ledger]
    curves: list[Curve]
    rows: list[dict[str, Any]] = field(default_factory=list)  # every started run: report.json
    # of QAT in a run, by grid: where arms differ in the start
    best_shares: dict[str, BestShare] = field(default_factory=dict)
    # On a priced clock: what each run had to spend, in updates of the baseline.
    priced_steps: int | None = None


Effects = Sequence[tuple[str, Effect]]


def headline_of(
    treatments: Sequence[Treatment],
    ledgers: Sequence[Ledger],
    best_shares: Mapping[str, BestShare] | None = None,
    has_clock: bool = True,
    grids_of_stores: Mapping[str, str] | None = None,
) -> str:
    """The verdict in words: of QAT stored as the baseline is, as if it took no time, against as
    many bytes, and against the baseline by each store; then of what changed without QAT, and how
    long QAT should last.

    Decided is an arm whose p is below ``LEVEL`` after Holm's correction for all arms of its clause:
    without it, one of 14 arms that do nothing is called better or worse in half of all studies.
    ``has_clock``: training was ended by a clock, that of the wall or a priced one, and not by a
    number of updates. ``grids_of_stores``: of stores that have one of their own.
    """
    own_grids = grids_of_stores or {}
    alike = [(t, _effect(t.alike)) for t in treatments if t.alike is not None]
    measured = [(ledger.name, ledger.at_equal_steps) for ledger in ledgers if ledger.is_measured]
    as_large = [(t.name, _effect(t.equal_bytes)) for t in treatments if t.equal_bytes is not None]
    spent = "wallclock" if has_clock else "updates"
    clauses: list[tuple[str, Effects]] = [
        (
            f"at equal {spent} and stored in the same way, training with QAT is",
            [(t.name, effect) for t, effect in alike if t.is_qat],
        ),
        ("at equal updates, as if QAT took no time, it is", measured if has_clock else []),
        ("at equal bytes, beside the budget solver's plan of the baseline, it is", as_large),
        *(
            (
                f"beside {store} of the baseline on {own_grids.get(store, 'the same grid')} it is",
                [(t.name, _effect(t.by_store[store])) for t in treatments if store in t.by_store],
            )
            for store in dict.fromkeys(name for t in treatments for name in t.by_store)
        ),
        ("without QAT a change is", [(t.name, effect) for t, effect in alike if not t.is_qat]),
    ]
    said = [
        f"{start} {_sorted_out(effects)}{_counted([effect.num_seeds for _, effect in effects])}"
        for start, effects in clauses
        if effects
    ]
    note = ""
    if any(len(_p_values(effects)) > 1 for _, effects in clauses):
        note = (
            f" Decided at {100 * LEVEL:g} % after Holm over the arms of a clause, beside plain "
            "95 % intervals."
        )
    said += [_best(grid, best) for grid, best in (best_shares or {}).items()]
    sentence = "; ".join(said) or "no arm has a baseline to compare with"
    return f"{sentence[0].upper()}{sentence[1:]}.{note}"


def _counted(seeds: Sequence[int]) -> str:
    """Nothing of one seed, which each arm says itself."""
    fewest, most = min(seeds), max(seeds)
    if most == 1:
        return ""
    return f" ({most} seeds)" if fewest == most else f" ({fewest} to {most} seeds)"


def _best(grid: str, best: BestShare) -> str:
    known = "" if best.low is None else f" (95 % {_percent(best.low)} to {_percent(best.high)})"
    return (
        f"of the shares tried on {grid} the best is {_percent(best.share)}{known} of the run, and "
        f"arXiv 2509.22935 predicts {_percent(best.predicted)} for "
        f"{best.tokens_per_parameter_byte:.3g} tokens per parameter byte"
    )


def _percent(share: float | None) -> str:
    assert share is not None
    return f"{100 * share:.3g} %"


def _effect(comparison: Contrast) -> Effect:
    v = comparison.verdict
    return Effect(v.mean, v.low, v.high, v.p_value, v.num_seeds)


def _p_values(effects: Effects) -> list[float]:
    return [effect.p_value for _, effect in effects if effect.p_value is not None]


def _sorted_out(effects: Effects) -> str:
    """Which are better, which are worse, which are not decided."""
    better: list[str] = []
    worse: list[str] = []
    undecided: list[str] = []
    adjusted = iter(holm(_p_values(effects)))
    for name, effect in effects:
        if effect.p_value is None or effect.low is None or effect.high is None:
            way = "worse" if effect.mean > 0.0 else "better"
            undecided.append(f"{name} (one seed: {abs(effect.mean):.4f} bits per byte {way})")
        elif next(adjusted) >= LEVEL:
            undecided.append(name)
        else:
            of_its_kind = better if effect.mean < 0.0 else worse
            of_its_kind.append(f"{name} ({_by(effect.mean, effect.low, effect.high)})")
    kinds = [("better with", better), ("worse with", worse), ("not decided for", undecided)]
    return _listed([f"{words} {_listed(names)}" for words, names in kinds if names])


def _by(mean: float, low: float, high: float) -> str:
    """Of a difference that is decided."""
    least, most = sorted((abs(low), abs(high)))
    return f"by {abs(mean):.4f} bits per byte [{least:.4f}, {most:.4f}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
