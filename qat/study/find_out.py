"""From runs to what they say: treatments, comparisons, ledgers, curves.

Pairs are runs of one seed. A treatment is compared with its baseline stored in the same way and, if
a study asks for it, with the baseline that the budget solver stores in as many bytes; QAT as it
stored itself also with the baseline by each of the study's stores on the same grid. All are files,
written once, read back and scored. No seed is left out: one without a score is named with the
reason. Of several runs of one seed the mean counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from qat.errors import TrainingError, UserError
from qat.runs.provenance import short
from qat.runs.result import SEEDS, Result, arm_label, differing, row_of, row_without_result
from qat.runs.run_folder import DIRTY_DIFF
from qat.study.curves import curve_of
from qat.study.files import (
    NO_ARM,
    ArmRun,
    StoredFile,
    StudyFiles,
    Target,
    as_large,
    fills_limit,
    mean_file,
)
from qat.study.findings import Contrast, Findings, Treatment
from qat.study.headline import sentences, ways_to_store, where_stored
from qat.study.law import BestShare, best_share
from qat.study.ledger import Twin, ledger_of
from qat.study.significance import bar_in_bpb, verdict
from qat.study.study import Study

Row = dict[str, Any]
EQUAL_STEPS = "equal_steps"  # in an arm's folder: its baseline of as many steps
FEWEST_SHARES = 3  # that are a curve


@dataclass
class PairedRun:
    """A run's file beside those of its baselines."""

    run: ArmRun
    file: StoredFile | None = None
    baselines: list[tuple[ArmRun, StoredFile]] = field(default_factory=list)
    as_large: StoredFile | None = None
    by_store: dict[str, StoredFile] = field(default_factory=dict)  # of QAT as it stored itself
    problem: str | None = None  # why it is not in the comparison
    notes: list[str] = field(default_factory=list)

    @property
    def alike(self) -> StoredFile | None:
        return mean_file([file for _, file in self.baselines]) if self.baselines else None


def pair_of(files: StudyFiles, run: ArmRun, store: str | None) -> PairedRun:
    """A scored run, stored in one way."""
    settings = files.study.settings
    pair, target = PairedRun(run), files.target(run, settings.stores[store] if store else None)
    pair.notes += _other_settings(files, run)
    try:
        pair.file = files.stored(run, Target(target))
        pair.notes += _oversize("its file", pair.file)
        if store is None and files.is_baseline(run):
            return pair
        for base in files.baselines(run):
            with _noted(pair, f"baseline {base.folder.name} has no file on this grid"):
                file = files.reference(base, run, target, pair.file)
                pair.baselines.append((base, file))
                pair.notes += _other_code(pair, base, file)
                pair.notes += _oversize(f"that of {base.folder.name}", file)
        if not pair.baselines:
            pair.problem = "; ".join(pair.notes)
        elif run.is_qat:
            base = pair.baselines[0][0]
            if settings.equal_bytes:
                with _noted(pair, f"{base.folder.name} has no file of as many bytes"):
                    filled = as_large(files.target(base), pair.file)
                    pair.as_large = files.stored(base, filled)
            if store is None:
                _add_by_store(files, pair, base)
    except (UserError, TrainingError) as error:
        pair.problem = str(error)
        pair.notes.append(pair.problem)
    if len(pair.baselines) > 1:
        pair.notes.append(f"against the mean of {len(pair.baselines)} baselines")
    return pair


@contextmanager
def _noted(pair: PairedRun, what: str) -> Iterator[None]:
    """A file that cannot be made is said, and the comparison that it was for left out."""
    try:
        yield
    except (UserError, TrainingError) as error:
        pair.notes.append(f"{what}: {error}")


def _add_by_store(files: StudyFiles, pair: PairedRun, base: ArmRun) -> None:
    """The baseline by each of the study's stores: what could be done in place of QAT. On the run's
    grid, or under the limit that both fill; where the run fills none, not by a store that does."""
    assert pair.file is not None
    settings = pair.run.row.settings
    has_filled = fills_limit(settings, files.target(pair.run))
    for name, store in files.study.settings.stores_of(pair.run.arm).items():
        target = files.target(pair.run, store)
        if has_filled or not fills_limit(settings, target):
            with _noted(pair, f"{base.folder.name} has no file by {name}"):
                pair.by_store[name] = files.reference(base, pair.run, target, pair.file)


def _other_settings(files: StudyFiles, run: ArmRun) -> list[str]:
    """What a reader should know if the seeds of an arm were trained in different ways."""
    first = files.of(run.arm)[0]
    ours, theirs = run.row.conditions, first.row.conditions
    said = f"in {first.folder.name}: not one training"
    return [
        f"{name} = {ours.get(name)}, and {theirs.get(name)} {said}"
        for name in differing(ours, theirs, (*SEEDS, "hardware"))
    ]


def _oversize(whose: str, file: StoredFile) -> list[str]:
    """What a reader should know of a file that no limit allows."""
    if file.total_bytes <= file.limit_bytes:
        return []
    return [f"{whose} is over the limit: {file.total_bytes:,} of {file.limit_bytes:,} bytes"]


def _other_code(pair: PairedRun, base: ArmRun, file: StoredFile) -> list[str]:
    """What a reader should know if a run and its baseline were not made by the same code."""
    assert pair.file is not None
    notes, commits = [], (pair.run.row.commit, base.row.commit)
    if commits[0] != commits[1]:
        ours, theirs = map(short, commits)
        notes.append(f"trained by commit {ours}, {base.folder.name} by {theirs}")
    elif commits[0].endswith("dirty") and _changes(pair.run) != _changes(base):
        ours = commits[0][:9]
        notes.append(f"trained by {ours} with other uncommitted changes than {base.folder.name}")
    if None not in (makers := {pair.file.storing_code, file.storing_code}) and len(makers) > 1:
        notes.append(f"its file and that of {base.folder.name} were stored by different code")
    return notes


def _changes(run: ArmRun) -> str | None:
    """What its code had that its commit has not; files that git does not know are not in it."""
    try:
        return (run.folder / DIRTY_DIFF).read_text(encoding="utf-8")
    except OSError:
        return None


def treatment_of(
    files: StudyFiles, arm: str, store: str | None, pairs: Sequence[PairedRun]
) -> Treatment | None:
    """An arm's runs, stored in one way; None if none of them was started."""
    started = [run for run in files.runs if run.arm == arm]
    if not started:
        return None
    left_out = [(run.seed, run.problem or "no score") for run in started if not run.is_scored]
    left_out += [(pair.run.seed, pair.problem) for pair in pairs if pair.problem]
    taken = [pair for pair in pairs if not pair.problem]
    seeds = {pair.run.seed for pair in taken}
    noted = [(pair.run.seed, note) for pair in taken for note in pair.notes]
    noted += [(s, f"a run of it was left out: {why}") for s, why in left_out if s in seeds]
    scores = _by_seed([(pair.run.seed, pair.file) for pair in pairs])
    name = arm if store is None else f"{arm}/{store}"
    baseline = files.study.settings.baseline
    alike = [(pair, pair.alike) for pair in pairs]
    grids = ", ".join(sorted({file.grid for _, file in alike if file}))
    labels = [file.grid for file in scores.values()]
    labels += [run.result.grid for run in started if run.result and store is None]
    grid = next(iter(labels), "")
    by_store = {
        way: _contrast(
            [(pair, pair.by_store.get(way)) for pair in pairs],
            f"{baseline} by {way} {where_stored(other, f'on {grid}')}",
        )
        for way, other in files.study.settings.stores_of(arm).items()
    }
    return Treatment(
        name=name,
        arm=arm,
        store=store,
        grid=grid,
        is_qat=any(run.is_qat for run in started),
        val_bpb={seed: file.val_bpb for seed, file in scores.items()},
        total_bytes={seed: file.total_bytes for seed, file in scores.items()},
        missing_seeds=_joined((s, why) for s, why in left_out if s not in seeds),
        alike=_contrast(alike, f"{baseline} on {grids}"),
        equal_bytes=_contrast(
            [(pair, pair.as_large) for pair in pairs], f"{baseline} filled to {name}'s bytes"
        ),
        by_store={way: found for way, found in by_store.items() if found is not None},
        notes=_joined(noted),
    )


def _joined(said: Iterable[tuple[int, str]]) -> dict[int, str]:
    """By seed, each thing once."""
    by_seed: dict[int, dict[str, None]] = {}
    for seed, words in said:
        by_seed.setdefault(seed, {})[words] = None
    return {seed: "; ".join(words) for seed, words in by_seed.items()}


def _by_seed(found: Sequence[tuple[int, StoredFile | None]]) -> dict[int, StoredFile]:
    """The mean of each seed's files."""
    files: dict[int, list[StoredFile]] = {}
    for seed, file in found:
        if file is not None:
            files.setdefault(seed, []).append(file)
    return {seed: mean_file(of_seed) for seed, of_seed in files.items()}


Referred = tuple[PairedRun, StoredFile | None]  # a run and what it is compared with


def _contrast(pairs: Sequence[Referred], against: str) -> Contrast | None:
    paired = [(pair, reference) for pair, reference in pairs if reference is not None]
    ours = _by_seed([(pair.run.seed, pair.file) for pair, _ in paired])
    theirs = _by_seed([(pair.run.seed, reference) for pair, reference in paired])
    if not ours:
        return None
    first = next(iter(ours.values()))
    arm, baseline = ([found[seed].val_bpb for seed in ours] for found in (ours, theirs))
    return Contrast(
        against=against,
        val_bpb={seed: file.val_bpb for seed, file in theirs.items()},
        total_bytes={seed: file.total_bytes for seed, file in theirs.items()},
        by_seed={seed: ours[seed].val_bpb - theirs[seed].val_bpb for seed in ours},
        verdict=verdict(arm, baseline, bar_in_bpb(first.val_bpb, first.val_loss)),
    )


def find_out(folder: Path, study: Study, console: Console) -> Findings:
    """All that the study's runs say by now. UserError if no run of it is there."""
    files = StudyFiles.of_study(folder, study, console)
    if not files.runs:
        raise UserError(f"study={folder}: none of its runs was started")
    return _findings(files, [*study.commands, f"python eval.py task=report study={folder.name}"])


def find_out_runs(folders: Sequence[Path], console: Console) -> Findings:
    """The same of runs outside a study; no ledgers and no curves are made of them."""
    return _findings(StudyFiles.of_folders(folders, console), [])


def _findings(files: StudyFiles, commands: list[str]) -> Findings:
    study = files.study
    treatments, ledgers = [], []
    pairs: dict[Path, PairedRun] = {}  # of runs as they stored themselves
    for arm in study.arms:
        for store in (None, *study.settings.stores_of(arm)):
            found = [pair_of(files, run, store) for run in files.of(arm)]
            pairs |= {pair.run.folder: pair for pair in found if store is None}
            treatment = treatment_of(files, arm, store, found)
            if treatment is not None:
                treatments.append(treatment)
                if study.settings.arms and treatment.is_qat and store is None:
                    ledger = ledger_of(treatment, _twins(files, arm))
                    ledgers += [ledger] if ledger is not None else []
    curves = [curve_of(arm, {run.folder: run.row for run in files.of(arm)})
              for arm in study.settings.arms and study.arms if files.of(arm)]  # fmt: skip
    results = [run.result for run in files.runs if run.result]
    shares = best_shares(files)
    budget_seconds = results[0].settings["budget_seconds"] if results else None
    priced_steps = _priced_steps(results)
    has_clock = budget_seconds is not None or priced_steps is not None
    ways = ways_to_store(treatments, study.settings.stores)
    headline, *details = sentences(treatments, ways, ledgers, shares, has_clock)
    return Findings(
        name=study.name,
        question=study.settings.question,
        headline=headline,
        details=details,
        beside=ways,
        best_shares=shares,
        baseline=study.settings.baseline,
        seeds=sorted({run.seed for run in files.runs if run.arm != NO_ARM}),
        budget_seconds=budget_seconds,
        priced_steps=priced_steps,
        hardware=sorted({r.hardware for r in results}),
        commits=sorted({r.commit for r in results}),
        commands=commands,
        treatments=treatments,
        ledgers=ledgers,
        curves=curves,
        rows=_rows(files, pairs),
    )


def _priced_steps(results: Sequence[Result]) -> int | None:
    """What runs on a priced clock had to spend, in updates of the baseline; None without one."""
    for result in results:
        schedule = result.settings.get("schedule", {})
        if {schedule.get("update_price", 1.0), schedule.get("qat_update_price", 1.0)} != {1.0}:
            steps: int | None = result.settings["max_steps"]
            return steps
    return None


STARTS = ("qat.start_step", "qat.start_fraction", "qat.start_lr_scale", "schedule.update_price",
          "schedule.qat_update_price")  # fmt: skip


def best_shares(files: StudyFiles) -> dict[str, BestShare]:
    """Grid -> the best share of QAT, where three or more were tried by arms that differ in the
    start alone; of a further kind of arm on one grid the key says how it differs from the first.
    Arms of one share are taken together. Seeds that a share lacks are left out."""
    kinds: list[tuple[ArmRun, dict[float, list[ArmRun]]]] = []  # its first run, and runs by share
    for arm in files.study.settings.arms and files.study.arms:
        runs = [run for run in files.of(arm) if run.is_qat]
        if not runs:
            continue
        share = mean(run.row.qat_steps / run.row.steps for run in runs)  # type: ignore[operator]
        same = [by_share for first, by_share in kinds if not _unlike(runs[0], first)]
        if same:
            same[0].setdefault(share, []).extend(runs)
        else:
            kinds.append((runs[0], {share: runs}))
    best: dict[str, BestShare] = {}
    first_on: dict[str, ArmRun] = {}
    for first, by_share in kinds:
        scores = {share: _scores(runs) for share, runs in by_share.items()}
        seeds = sorted(set.intersection(*map(set, scores.values())))
        tokens = [run.row.tokens_per_parameter_byte for runs in by_share.values() for run in runs
                  if run.row.tokens_per_parameter_byte]  # fmt: skip
        if len(scores) < FEWEST_SHARES or not seeds or not tokens:
            continue
        other = first_on.setdefault(first.row.grid, first)
        differs = (f", {name} = {first.row.conditions.get(name)}" for name in _unlike(first, other))
        best["".join([first.row.grid, *differs])] = best_share(
            {share: [of[seed] for seed in seeds] for share, of in scores.items()}, mean(tokens)
        )
    return best


def _unlike(one: ArmRun, other: ArmRun) -> list[str]:
    """Names of what two runs differ in beside seed and start."""
    grid = [] if one.row.grid == other.row.grid else ["grid"]
    return grid + differing(one.row.conditions, other.row.conditions, (*SEEDS, *STARTS))


def _scores(runs: Sequence[ArmRun]) -> dict[int, float]:
    """By seed the mean of its runs."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        if run.row.val_bpb_artifact is not None:
            by_seed.setdefault(run.seed, []).append(run.row.val_bpb_artifact)
    return {seed: mean(found) for seed, found in by_seed.items()}


def _twins(files: StudyFiles, arm: str) -> list[Twin]:
    """Each run of the arm beside the one that differs in QAT alone, and that of equal steps."""
    twins = []
    for run in files.of(arm):
        for other in files.twins(run)[:1]:
            try:
                target = files.target(run)
                own = files.stored(run, Target(target))
                stored = files.reference(other, run, target, own)
            except (UserError, TrainingError) as error:
                files.console.print(f"no ledger of {run.folder.name}: {error}", highlight=False)
                continue
            equal = Result.read(run.folder / EQUAL_STEPS)
            if equal is None and _counts_as_many(run.row, other.row):
                equal = other.row
            equal_bpb = equal.val_bpb_float if equal is not None else None
            twins.append(Twin(run.row, other.row, other.folder, stored.val_bpb, equal_bpb))
    return twins


def _counts_as_many(one: Result, other: Result) -> bool:
    """Runs that no clock ends, of as many updates."""
    has_clock = any(row.settings["budget_seconds"] is not None for row in (one, other))
    return not has_clock and one.steps == other.steps


def _rows(files: StudyFiles, pairs: dict[Path, PairedRun]) -> list[Row]:
    """One per run. Of runs outside a study also one per file made of a baseline, before the first
    run that needed it: no arm says how it is stored."""
    rows: list[Row] = []
    shown: set[tuple[Path, str]] = set()
    for run in files.runs:
        if run.result is None:
            of_arm = {} if run.arm == NO_ARM else {"arm": run.arm, "seed": run.seed}
            rows.append(row_without_result(run.folder, run.status, run.problem or "") | of_arm)
            continue
        row, pair = row_of(run.result), pairs.get(run.folder)
        if pair is not None:
            for base, file in pair.baselines:
                key = base.folder, str(file.exported)
                if file.exported and not files.study.settings.arms and key not in shown:
                    shown.add(key)
                    rows.append(_exported_row(base.row, file.exported))
            if pair.file is not None and pair.alike is not None:
                row["delta_bpb"] = pair.file.val_bpb - pair.alike.val_bpb
            row["note"] = "; ".join(filter(None, [row["note"], *pair.notes]))
        rows.append(row)
    return rows


def _exported_row(baseline: Result, exported: dict[str, Any]) -> Row:
    row = row_of(baseline) | exported | {"exported": True}
    row["arm"] = arm_label("none", exported["grid"], baseline.settings)
    row["total_bytes"] = exported["artifact_bytes"] + exported["code_bytes"]
    row["val_bpb_snapped"] = None  # not measured on this grid
    row["quant_gap_bpb"] = exported["val_bpb_artifact"] - row["val_bpb_float"]
    oversize = "; OVERSIZE" if row["total_bytes"] > row["limit_bytes"] else ""
    row["note"] = f"exported from {baseline.run_name}{oversize}"
    return row
