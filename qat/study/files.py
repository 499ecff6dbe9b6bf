"""Runs that are compared, whose baselines they have, and the files that are made of them.

A study names its arms and their baseline. Of runs outside a study an arm is what differs in its
seed alone, and its baselines are the runs without QAT that differ in their quantization alone; of
several the mean counts, so none is picked. Files are written once, read back and scored; what is
there already is used again.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from qat.budget.budget import Budget
from qat.errors import UserError
from qat.golf.bundle import count_code_bytes
from qat.runs.result import QUANTIZATION, SEEDS, Result, conditions, differing, is_baseline, row_of
from qat.runs.run_folder import CONFIG, read_config
from qat.runs.store_again import export_again, storage_of
from qat.settings.schema import StoreSettings, StudySettings
from qat.study.study import Study, run_name

Settings = dict[str, Any]
NO_ARM = "?"  # of a run outside a study that has no readable row


class StoredFile(NamedTuple):
    """A file: its score, size, and the hash of the code that stored it."""

    val_bpb: float
    val_loss: float
    total_bytes: int
    code_bytes: int  # of these
    limit_bytes: int
    grid: str
    storing_code: str | None
    exported: dict[str, Any] | None  # what it changes in the run's row; None: the run's own file


class Target(NamedTuple):
    """How a run is to be stored: settings, and the limit if it is to fill one, else None."""

    settings: Settings  # grid, plan, artifact
    limit_bytes: int | None = None
    code_bytes: int | None = None  # that the limit holds too; None: of the code here

    def is_file_of(self, settings: Settings) -> bool:
        """A run of these settings stored it so itself."""
        has_limit = self.limit_bytes in (None, settings["limit_bytes"])
        ours, theirs = (
            conditions({key: stored[key] for key in ("grid", "plan", "artifact")})
            for stored in (self.settings, settings)
        )
        return has_limit and ours == theirs


def fills_limit(settings: Settings, storage: Settings) -> bool:
    """A run of these settings, stored so, was made to fill its limit."""
    return settings["qat"]["to_bytes"] or storage["artifact"]["fill"]


def beside(own: Settings, settings: Settings, storage: Settings, file: StoredFile) -> Target:
    """How a baseline is stored to be compared with the ``file`` of a run of these settings that is
    stored so.

    Alike; but beside what was made to fill a limit it is what the solver makes of the baseline for
    that limit, on grids of the baseline's ``own`` storage: there is no grid to share. As much of
    the limit is code as was then.
    """
    if not fills_limit(settings, storage):
        return Target(storage)
    artifact = storage["artifact"] | {"fill": True}
    return Target(own | {"artifact": artifact}, settings["limit_bytes"], file.code_bytes)


def as_large(own: Settings, file: StoredFile) -> Target:
    """The baseline stored by the solver in as many bytes as the run's file, which may have left
    some of its limit."""
    rounded = {"fill": True, "method": "round", "gptq_bit_price": 0.0}
    artifact = own["artifact"] | rounded
    return Target(own | {"artifact": artifact}, file.total_bytes, file.code_bytes)


def mean_file(files: Sequence[StoredFile]) -> StoredFile:
    """Of several baselines."""
    return files[0]._replace(
        val_bpb=mean(file.val_bpb for file in files),
        val_loss=mean(file.val_loss for file in files),
        total_bytes=round(mean(file.total_bytes for file in files)),
    )


@dataclass(frozen=True, eq=False)
class ArmRun:
    """A started run of an arm; ``result`` is None if it has no readable row."""

    folder: Path
    arm: str
    seed: int
    result: Result | None
    status: str
    problem: str | None  # why it does not count

    @staticmethod
    def read(folder: Path, arm: str = NO_ARM, seed: int = 0) -> ArmRun:
        try:
            result = Result.read(folder)
        except UserError as error:
            return ArmRun(folder, arm, seed, None, "unreadable", str(error))
        if result is None:
            died = f"{folder.name}: no result; it died or is still running"
            return ArmRun(folder, arm, seed, None, "unfinished", died)
        problem = "its QAT never started" if result.qat_never_started else None
        if result.status == "failed":
            problem = result.error
        return ArmRun(folder, arm, result.seed, result, result.status, problem)

    @property
    def row(self) -> Result:
        """Of a run that has one."""
        assert self.result is not None
        return self.result

    @property
    def is_scored(self) -> bool:
        """And the score is of what was asked for."""
        row = self.result
        return row is not None and row.val_bpb_artifact is not None and not row.qat_never_started

    @property
    def is_qat(self) -> bool:
        return self.result is not None and not is_baseline(self.result)


class StudyFiles:
    """The runs, and the files that their study makes of them."""

    def __init__(self, runs: Iterable[ArmRun], study: Study, console: Console) -> None:
        self.runs = list(runs)
        self.study, self.console = study, console
        self._stored: dict[tuple[Path, str], StoredFile] = {}

    @staticmethod
    def of_study(folder: Path, study: Study, console: Console) -> StudyFiles:
        """Every started run of the study's arms, by arm and seed."""
        found = []
        for arm in study.arms:
            prefix = run_name(arm, 0).removesuffix("0")
            for path in folder.glob(f"{glob.escape(prefix)}*"):
                seed = path.name.removeprefix(prefix)
                is_run = seed.isdigit() and (path / CONFIG).is_file()  # else killed as it took it
                if is_run and read_config(path, "study")[1].get("arm") == arm:
                    found.append(ArmRun.read(path, arm, int(seed)))
        found.sort(key=lambda run: (study.arms.index(run.arm), run.seed))
        return StudyFiles(found, study, console)

    @staticmethod
    def of_folders(folders: Iterable[Path], console: Console) -> StudyFiles:
        """Runs outside a study, by seed, those without QAT first and those without a row last. What
        differs in its seed alone is an arm; a failed run, which may not know its data, is of the
        first arm of its label."""
        runs = [ArmRun.read(folder) for folder in folders]
        runs.sort(key=lambda run: (run.result is None, run.seed, run.is_qat, run.folder.name))
        first: dict[str, tuple[str, ArmRun]] = {}  # of each arm its label and first run
        arms: dict[ArmRun, str] = {}
        for run in sorted(runs, key=lambda run: not run.is_scored):
            if run.result is None:
                continue
            label = row_of(run.result)["arm"]
            known = {
                arm: _differing(other, run, SEEDS)
                for arm, (its_label, other) in first.items()
                if its_label == label
            }
            same = [arm for arm, names in known.items() if not names or not run.is_scored]
            for names in list(known.values())[:1]:  # two arms of one label are told apart
                label += "".join(f", {name} = {run.row.conditions.get(name)}" for name in names)
            arms[run] = same[0] if same else label
            first.setdefault(arms[run], (row_of(run.result)["arm"], run))
        named = [replace(run, arm=arms.get(run, NO_ARM)) for run in runs]
        return StudyFiles(named, Study("runs", StudySettings(), [*first], []), console)

    def of(self, arm: str) -> list[ArmRun]:
        """Those that have a score."""
        return [run for run in self.runs if run.arm == arm and run.is_scored]

    def stored(self, run: ArmRun, target: Target) -> StoredFile:
        """The run as ``target`` says: its own file, or one made of its checkpoint. Looked for once:
        many arms are compared with one file of their baseline.

        UserError or TrainingError if it cannot be made.
        """
        key = run.folder, json.dumps(target)
        if key not in self._stored:
            self._stored[key] = self._made(run, target)
        return self._stored[key]

    def _made(self, run: ArmRun, target: Target) -> StoredFile:
        row, again = asdict(run.row), None
        is_own = target.is_file_of(row["settings"])
        if not (is_own and target.code_bytes in (None, row["code_bytes"])):
            code_bytes = target.code_bytes or count_code_bytes()
            budget = Budget(target.limit_bytes or row["limit_bytes"], code_bytes)
            again = export_again(run.folder, run.row, target.settings, budget, self.console)
            row |= again
        return StoredFile(
            row["val_bpb_artifact"],
            row["val_loss_artifact"],
            (row["artifact_bytes"] or 0) + (row["code_bytes"] or 0),
            row["code_bytes"] or 0,
            row["limit_bytes"],
            row["grid"],
            row["storing_code"],
            again,
        )

    def target(self, run: ArmRun, store: StoreSettings | None = None) -> Settings:
        return storage_of(run.row.settings, self.study.settings, store or StoreSettings())

    def reference(
        self, base: ArmRun, run: ArmRun, storage: Settings, file: StoredFile
    ) -> StoredFile:
        """The baseline stored to be compared with the ``file`` of ``run``, which is stored so; its
        own file beside what another store makes of it."""
        own = self.target(base)
        target = Target(own) if base is run else beside(own, run.row.settings, storage, file)
        return self.stored(base, target)

    def is_baseline(self, run: ArmRun) -> bool:
        """It is compared with nothing, as it stored itself."""
        design = self.study.settings
        return run.arm == design.baseline if design.arms else not run.is_qat

    def twins(self, run: ArmRun) -> list[ArmRun]:
        """Runs that differ from it in their quantization alone and have none, the baseline's
        first."""
        found = [base for base in self._without_qat() if not _differing(run, base, QUANTIZATION)]
        return sorted(found, key=lambda base: base.arm != self.study.settings.baseline)

    def baselines(self, run: ArmRun) -> list[ArmRun]:
        """What the run is compared with. UserError says why with nothing."""
        design = self.study.settings
        if design.arms:
            found = [base for base in self.of(design.baseline) if base.seed == run.seed]
            if not found:
                raise UserError("no baseline of this seed has a score")
            varied = {*design.arms.get(run.arm, {}), *design.arms[design.baseline]}
            if names := _differing(run, found[0], (*QUANTIZATION, *varied)):
                raise UserError(f"its baseline had other {', '.join(names)}")
            return found
        if found := self.twins(run):
            return found
        reason = "no baseline in this report"
        others = {base: _differing(run, base, QUANTIZATION) for base in self._without_qat()}
        if nearest := min(others, key=lambda base: len(others[base]), default=None):
            reason += f": {nearest.folder.name} differs in {', '.join(others[nearest])}"
        raise UserError(reason)

    def _without_qat(self) -> list[ArmRun]:
        return [run for run in self.runs if run.is_scored and not run.is_qat]


def _differing(one: ArmRun, other: ArmRun, apart_from: Iterable[str]) -> list[str]:
    return differing(one.row.conditions, other.row.conditions, apart_from)
