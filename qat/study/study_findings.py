"""From the runs of a study to what they say: treatments, comparisons, ledgers, curves.

Pairs are runs of one seed. A treatment is compared with the study's baseline stored in the same way
and, if the study asks for it, with the baseline that the budget solver fits to as many bytes: both
are files, written once, read back and scored. No seed is left out: one without a score is named
with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from qat.errors import TrainingError, UserError
from qat.settings.schema import StoreSettings
from qat.study.curves import curve_of
from qat.study.findings import Comparison, Findings, Treatment
from qat.study.headline import headline_of
from qat.study.ledger import Twin, ledger_of
from qat.study.pairing import identity, is_baseline, row_of, row_without_result, storage
from qat.study.result import Result
from qat.study.run_folder import read_config
from qat.study.significance import bar_in_bpb, verdict
from qat.study.store_again import export_again, storage_of
from qat.study.study_runs import EQUAL_STEPS, Study, run_name

Row = dict[str, Any]


class Stored(NamedTuple):
    """A file: its score and size."""

    val_bpb: float
    val_loss: float
    total_bytes: int
    grid: str


@dataclass(frozen=True)
class ArmRun:
    """A started run of an arm; ``result`` is None if it has no readable row."""

    folder: Path
    arm: str
    seed: int
    result: Result | None
    problem: str | None  # why it has no score

    @property
    def is_scored(self) -> bool:
        return self.result is not None and self.result.val_bpb_artifact is not None

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """What its twin shares; compared with every other run."""
        return None if self.result is None else identity(self.result)


def find_runs(folder: Path, study: Study) -> list[ArmRun]:
    """Every started run of the study's arms, by arm and seed."""
    found = []
    for arm in study.arms:
        prefix = run_name(arm, 0).removesuffix("0")
        for path in folder.glob(f"{prefix}*"):
            seed = path.name.removeprefix(prefix)
            if seed.isdigit() and read_config(path, "study")[1].get("arm") == arm:
                found.append(_read_run(path, arm, int(seed)))
    return sorted(found, key=lambda run: (study.arms.index(run.arm), run.seed))


def _read_run(path: Path, arm: str, seed: int) -> ArmRun:
    try:
        result = Result.read(path)
    except UserError as error:
        return ArmRun(path, arm, seed, None, str(error))
    if result is None:
        return ArmRun(path, arm, seed, None, "no result; it died or is still running")
    return ArmRun(path, arm, seed, result, result.error if result.status == "failed" else None)


class StudyFiles:
    """The runs, and the files that their study makes of them."""

    def __init__(self, runs: Iterable[ArmRun], study: Study, console: Console) -> None:
        self.runs = list(runs)
        self.study, self.console = study, console

    def of(self, arm: str) -> dict[int, ArmRun]:
        """By seed, those that have a score."""
        return {run.seed: run for run in self.runs if run.arm == arm and run.is_scored}

    def stored(self, run: ArmRun, target: dict[str, Any], limit_bytes: int | None = None) -> Stored:
        """The run as ``target`` settings store it: its own file, or one made of its checkpoint.

        UserError or TrainingError if it cannot be made.
        """
        result = run.result
        assert result is not None
        if limit_bytes is None and storage(result.settings) == storage(target):
            assert result.val_bpb_artifact is not None
            assert result.val_loss_artifact is not None
            total = (result.artifact_bytes or 0) + (result.code_bytes or 0)
            return Stored(result.val_bpb_artifact, result.val_loss_artifact, total, result.grid)
        limit = limit_bytes or result.limit_bytes
        again = export_again(run.folder, result, target, limit, self.console)
        total = again["artifact_bytes"] + again["code_bytes"]
        return Stored(again["val_bpb_artifact"], again["val_loss_artifact"], total, again["grid"])

    def target(self, run: ArmRun, store: StoreSettings | None) -> dict[str, Any]:
        assert run.result is not None
        return storage_of(run.result.settings, self.study.settings, store or StoreSettings())

    def twin(self, run: ArmRun) -> ArmRun | None:
        """The run of the study that differs in its quantization alone; the baseline's first."""
        same = [
            other
            for other in self.runs
            if other.result is not None
            and other.is_scored
            and is_baseline(other.result)
            and other.identity == run.identity
        ]
        same.sort(key=lambda other: other.arm != self.study.settings.baseline)
        return same[0] if same else None


def _fitted(target: dict[str, Any]) -> dict[str, Any]:
    return target | {"artifact": target["artifact"] | {"fit": True, "method": "round"}}


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
            scores[seed] = files.stored(run, target)
            if is_reference:
                continue
            reason = _why_unpaired(run, baseline.get(seed))
            if reason:
                missing[seed] = reason
                continue
            base = baseline[seed]
            like = files.target(base, None) if arm == settings.baseline else target
            alike[seed] = files.stored(base, like)
            if settings.equal_bytes and is_qat:
                own = files.target(base, None)
                as_large[seed] = files.stored(base, _fitted(own), scores[seed].total_bytes)
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
        equal_bytes=_comparison(scores, as_large, f"{settings.baseline} fitted to {name}'s bytes"),
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
        for store in (None, *study.settings.stores):
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
            stored = files.stored(other, files.target(run, None))
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
