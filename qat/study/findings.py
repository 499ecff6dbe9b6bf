"""What runs say together, as their report shows it: plain values, written to ``findings.json``.

A treatment is a way to train and a way to store: an arm, or an arm and one of the study's stores.
All differences are in bits per byte, treatment - reference: below 0 the treatment is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qat.study.law import BestShare
from qat.study.significance import Effect, Verdict


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
    headline: str  # does QAT pay? In a sentence
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
    details: list[str] = field(default_factory=list)  # sentences behind the headline
    # A way to store the baseline, in words -> QAT as it stored itself less that, by treatment.
    beside: dict[str, dict[str, Effect]] = field(default_factory=dict)
