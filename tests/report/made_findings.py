"""Made-up findings of a study, in the shape in which it writes them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from qat.study.findings import Contrast, Curve, Findings, Ledger, Treatment
from qat.study.headline import ways_to_store
from qat.study.significance import Effect, verdict

BAR_BPB = 0.00296
GRIDS = ("int8", "int6", "int4", "int4_g64", "ternary")


def interval(values: list[float]) -> Effect:
    found = verdict(values, [0.0] * len(values), BAR_BPB)
    return Effect(found.mean, found.low, found.high)


def make_row(run_name: str, arm: str, seed: int, **changed: Any) -> dict[str, Any]:
    """A finished run of an identity gradient."""
    row = {
        "run_name": run_name, "arm": arm, "seed": seed, "status": "finished", "note": "",
        "exported": False, "delta_bpb": -0.0071, "val_bpb_float": 1.35, "val_bpb_artifact": 1.356,
        "quant_gap_bpb": 0.006, "artifact_bytes": 1_700_038, "total_bytes": 1_826_038,
        "steps": 1_234, "ms_per_step": 61.5, "gradient": "identity", "on_grid_share": 1.0,
        "nonzero_gradient_share": 0.998, "movable_share": 1.0, "qat_first_step": 618,
        "qat_last_step": 1_234, "qat_never_started": False, "train_seconds": 75.02,
        "overshoot_seconds": 0.02,
    }  # fmt: skip
    return {**row, **changed}


def make_findings(
    num_seeds: int = 5,
    num_treatments: int = 3,
    num_rows: int = 12,
    has_equal_bytes: bool = True,
    **changed: Any,
) -> Findings:
    """A baseline and so many treatments, each with its ledger; ``changed``: fields of the
    findings."""
    noise = random.Random(7)
    seeds = list(range(1, num_seeds + 1))
    base = {seed: 1.3555 + noise.gauss(0, 0.0008) for seed in seeds}
    sizes = {seed: 1_826_038 + 120 * seed for seed in seeds}
    treatments = [
        Treatment("none, rounded to int6", "none", None, "int6", False, base, sizes, {}, None, None)
    ]
    ledgers, curves = [], [make_curve("none", None, 1.348, 1.3555)]
    for at in range(num_treatments):
        grid, is_last = GRIDS[at % len(GRIDS)], at == num_treatments - 1
        size = (-0.0071, -0.0009, 0.0034, -0.0492)[at % 4]
        parts = {
            seed: (
                0.0011 + noise.gauss(0, 0.0002), 0.3 * size + noise.gauss(0, 0.0005),
                0.7 * size + noise.gauss(0, 0.0004),
            )
            for seed in seeds
        }  # fmt: skip
        differences = {seed: sum(parts[seed]) for seed in seeds}
        bpb = {seed: base[seed] + differences[seed] for seed in seeds}
        found = verdict(list(bpb.values()), list(base.values()), BAR_BPB)
        at_bytes = dict.fromkeys(seeds, 1826038 - 140000 * at)
        alike = Contrast(f"none, rounded to {grid}", base, at_bytes, differences, found)
        shifted = {seed: delta + 0.004 for seed, delta in differences.items()}
        fitted = verdict(list(shifted.values()), [0.0] * num_seeds, BAR_BPB)
        against = {seed: bpb[seed] - shifted[seed] for seed in seeds}
        equal = Contrast("none, fitted to as many bytes", against, at_bytes, shifted, fitted)
        name = f"{grid} QAT from {0.5 + at / 20:g}"
        treatments.append(
            Treatment(
                name, name, "gptq" if at % 3 == 2 else None, grid, True, bpb,
                {seed: 1_826_038 - 140_000 * at + 300 * seed for seed in seeds},
                {9: "the clock ended before the first step"} if is_last else {},
                alike, equal if has_equal_bytes and at % 2 == 0 else None,
            )
        )  # fmt: skip
        throughput, training, gap = (interval([parts[seed][i] for seed in seeds]) for i in range(3))
        total = interval(list(differences.values()))
        basis = "runs of 1,190 steps" if at % 2 == 0 else "slope of the loss curve at the end"
        ledgers.append(Ledger(name, at % 2 == 0, throughput, training, gap, total, gap, basis))
        curves.append(make_curve(name, 30.0 + 3 * at, 1.349 + at / 500, 1.3555 + size))
    rows = [make_row(f"run-{at}", "int6 on int6", at % num_seeds + 1) for at in range(num_rows)]
    findings = Findings(
        name="int6 at 75 s", question="Does int6 QAT beat rounding at equal wallclock?",
        headline="int8 QAT from 0.5 beats rounding by 0.0060 bpb in 5 of 5 seeds; "
        "the others are not told apart.",
        baseline="none", seeds=seeds, budget_seconds=75.0,
        hardware=["2 cores of an AMD EPYC 9575F"], commits=["0123abcd"],
        commands=["python train.py -m experiment=pair seed=1,2,3", "python eval.py task=study"],
        treatments=treatments, ledgers=ledgers, curves=curves, rows=rows,
        details=["Beside rounding, QAT is better with int8."], beside=ways_to_store(treatments, {}),
    )  # fmt: skip
    return replace(findings, **changed)


def make_curve(arm: str, switch: float | None, bpb_float: float, bpb_artifact: float) -> Curve:
    noise = random.Random(arm)
    seconds = [0.375 * step for step in range(1, 201)]
    level = 0.02 * noise.random()
    bpb = [1.3 + level + 1.6 / (1 + s / 4) + noise.gauss(0, 0.004) for s in seconds]
    return Curve(arm, seconds, bpb, switch, bpb_float, bpb_artifact)
