"""From the runs of a study to what they say: treatments, comparisons, ledgers, curves.

Pairs are runs of one seed. A treatment is compared with the study's baseline stored in the same way
and, if the study asks for it, with the baseline that the budget solver stores in as many bytes:
both are files, written once, read back and scored. No seed is left out: one without a score is
named with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from qat.errors import TrainingError, UserError
from qat.runs.result import Result, is_baseline, row_of, row_without_result
from qat.study.curves import curve_of
from qat.study.files import ArmRun, Stored, StudyFiles, find_runs
from qat.study.findings import Comparison, Findings, Treatment
from qat.study.headline import headline_of
from qat.study.ledger import Twin, ledger_of
from qat.study.pairing import Target
from qat.study.significance import bar_in_bpb, verdict
from qat.study.study import EQUAL_STEPS, Study

Row = dict[str, Any]


def treatment_of(files: StudyFiles, arm: str, store: str | None) -> Treatment | None:
    """An arm's runs, stored in one way; None if none of its runs has a score."""
    settings = files.study.settings
    how = settings.stores[store] if store else None
    is_reference = arm == settings.baseline and store is None
    scores: dict[int, Stored] = {}
    missing = {run.seed: run.problem or "no score" for run in files.runs
               if run.arm == arm and not run.is_scored}  # fmt: skip
    alike: dict[int, Stored] = {}
    as_large: dict[int, Stored] = {}
    baseline = files.of(settings.baseline)
    runs = files.of(arm)
    is_qat = any(run.result and not is_baseline(run.result) for run in runs.values())
    for seed, run in runs.items():
        target = files.target(run, how)
        try:
            scores[seed] = files.stored(run, Target(target, None))
            if is_reference:
                continue
            reason = _why_unpaired(run, baseline.get(seed))
            if reason:
                missing[seed] = reason
                continue
            base = baseline[seed]
            if arm == settings.baseline:
                alike[seed] = files.stored(base, Target(files.target(base, None), None))
            else:
                alike[seed] = files.reference(base, run, target)
            if settings.equal_bytes and is_qat:
                as_large[seed] = files.as_large(base, run, target, scores[seed].total_bytes)
        except (UserError, TrainingError) as error:
            missing[seed] = str(error)
    if not scores:
        return None
    name = arm if store is None else f"{arm}/{store}"
    first = next(iter(scores.values()))
    return Treatment(
        name=name,
        arm=arm,
        store=store,
        grid=first.grid,
        is_qat=is_qat,
        val_bpb={seed: s.val_bpb for seed, s in scores.items()},
        total_bytes={seed: s.total_bytes for seed, s in scores.items()},
        missing_seeds=missing,
        alike=_comparison(scores, alike, f"{settings.baseline} on {_grids(alike)}"),
        equal_bytes=_comparison(scores, as_large, f"{settings.baseline} filled to {name}'s bytes"),
    )


def _why_unpaired(run: ArmRun, base: ArmRun | None) -> str | None:
    if base is None:
        return "no baseline of this seed has a score"
    assert run.result is not None
    assert base.result is not None
    for key in ("hardware", "data", "profile"):
        if getattr(run.result, key) != getattr(base.result, key):
            return f"its baseline had other {key}"
    return None


def _grids(files: dict[int, Stored]) -> str:
    return ", ".join(sorted({file.grid for file in files.values()}))


def _comparison(
    scores: dict[int, Stored], references: dict[int, Stored], against: str
) -> Comparison | None:
    seeds = [seed for seed in scores if seed in references]
    if not seeds:
        return None
    first = scores[seeds[0]]
    ours, theirs = ([found[s].val_bpb for s in seeds] for found in (scores, references))
    return Comparison(
        against=against,
        val_bpb={seed: references[seed].val_bpb for seed in seeds},
        total_bytes={seed: references[seed].total_bytes for seed in seeds},
        by_seed={seed: scores[seed].val_bpb - references[seed].val_bpb for seed in seeds},
        verdict=verdict(ours, theirs, bar_in_bpb(first.val_bpb, first.val_loss)),
    )


def find_out(folder: Path, study: Study, console: Console) -> Findings:
    """All that the study's runs say by now. UserError if no run of it is there."""
    files = StudyFiles(find_runs(folder, study), study, console)
    if not files.runs:
        raise UserError(f"study={folder}: none of its runs was started")
    treatments, ledgers = [], []
    for arm in study.arms:
        stores = [name for name, s in study.settings.stores.items() if s.is_of(arm)]
        for store in (None, *stores):
            treatment = treatment_of(files, arm, store)
            if treatment is not None:
                treatments.append(treatment)
                if treatment.is_qat and store is None:
                    ledger = ledger_of(treatment, _twins(files, arm))
                    ledgers += [ledger] if ledger is not None else []
    differences = {t.arm: t.alike.by_seed for t in treatments if t.store is None and t.alike}
    rows = [_row(run, differences.get(run.arm, {}).get(run.seed)) for run in files.runs]
    results = [run.result for run in files.runs if run.result]
    curves = [curve_of(arm, {r.folder: r.result for r in files.of(arm).values() if r.result})
              for arm in study.arms if files.of(arm)]  # fmt: skip
    return Findings(
        name=study.name,
        question=study.settings.question,
        headline=headline_of(treatments, ledgers),
        baseline=study.settings.baseline,
        seeds=sorted({run.seed for run in files.runs}),
        budget_seconds=results[0].settings["budget_seconds"] if results else None,
        hardware=sorted({r.hardware for r in results}),
        commits=sorted({r.commit for r in results}),
        commands=[*study.commands, f"python eval.py task=report study={folder.name}"],
        treatments=treatments,
        ledgers=ledgers,
        curves=curves,
        rows=rows,
    )


def _twins(files: StudyFiles, arm: str) -> list[Twin]:
    """Each run of the arm beside the one that differs in QAT alone, and that of equal steps."""
    twins = []
    for run in files.of(arm).values():
        other = files.twin(run)
        if other is None or other.result is None or run.result is None:
            continue
        try:
            stored = files.reference(other, run, files.target(run, None))
        except (UserError, TrainingError) as error:
            files.console.print(f"no ledger of {run.folder.name}: {error}", highlight=False)
            continue
        equal = Result.read(run.folder / EQUAL_STEPS)
        equal_bpb = equal.val_bpb_float if equal is not None else None
        twins.append(Twin(run.result, other.result, other.folder, stored.val_bpb, equal_bpb))
    return twins


def _row(run: ArmRun, delta_bpb: float | None) -> Row:
    if run.result is None:
        return row_without_result(run.folder, "unfinished", run.problem or "") | {
            "arm": run.arm, "seed": run.seed
        }  # fmt: skip
    gradient = run.result.settings["qat"]["gradient"]
    return row_of(run.result) | {"gradient": gradient, "delta_bpb": delta_bpb}
