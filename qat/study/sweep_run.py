"""One run of a sweep or study: made once, gone on with after a kill, and its study's files of it.

As an arm's run ends, its files and those of the baseline of its seed that it is compared with are
made: not all at the end, and by as many processes as there are runs at a time. Each QAT arm may
hold a run of its own, ``equal_steps/``: its baseline trained for as many steps as the arm had
(``ledger=full``).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qat.budget.budget import Budget
from qat.errors import TrainingError, UserError
from qat.golf.bundle import count_code_bytes
from qat.runs.result import Result
from qat.runs.run_folder import CHOICES, CONFIG, LOCK, kept_checkpoint
from qat.runs.store_again import export_again, storage_of
from qat.settings.schema import ForkSettings, QatSettings, TrainSettings
from qat.study.files import StudyFiles
from qat.study.find_out import EQUAL_STEPS, pair_of
from qat.study.study import Study, folder_of, run_name, study_file

if TYPE_CHECKING:
    from qat.settings.command_line import Job

log = logging.getLogger("qat")

RunOne = Callable[[TrainSettings, "Job"], int]  # its exit code


def run_in_sweep(s: TrainSettings, job: Job, run_one: RunOne) -> int:
    """Train a run of a sweep, or go on with it; then what a study makes of its arms. The exit
    code."""
    assert job.sweep_dir is not None
    if not job.choices.get("arm"):
        return _run_once(s, job, folder_of(s, job.sweep_dir), run_one)
    folder = job.sweep_dir / run_name(str(job.choices["arm"]), s.seed)
    fork = s.fork
    if fork.run and fork.step and is_lost(job.sweep_dir, fork.run, fork.step, folder.name):
        s = replace(s, fork=ForkSettings(fork.keep_steps))
    code = _run_once(replace(s, run_name=folder.name), job, folder, run_one)
    result = Result.read(folder)
    if result is None or result.status == "failed":
        return code
    budget = Budget(s.limit_bytes, count_code_bytes())
    try:
        for store in s.study.stores_of(str(job.choices["arm"])).values():
            target = storage_of(result.settings, s.study, store)
            export_again(folder, result, target, budget, Console(stderr=True))
    except (UserError, TrainingError) as error:
        log.error("error: %s", error)
        return error.exit_code
    _store_baseline_for(job, s.seed)
    # An arm that made all its max_steps has lost none: the baseline is the run of as many.
    is_cut_short = s.budget_seconds is not None or result.steps != s.max_steps
    if s.ledger == "full" and result.qat_steps and is_cut_short:
        code = max(code, _run_equal_steps(s, job, folder, result, run_one))
    return code


def is_lost(sweep_dir: Path, trunk: str, step: int, run: str) -> bool:
    """What ``run`` was to go on from; then it is said."""
    if kept_checkpoint(sweep_dir / trunk, step).exists():
        return False
    print(f"{trunk} kept nothing after {step} updates: {run} makes them all")
    return True


def _store_baseline_for(job: Job, seed: int) -> None:
    """As the run's comparisons ask for it; reports say what could not be made."""
    assert job.sweep_dir is not None
    arm, path = str(job.choices["arm"]), study_file(job.sweep_dir, str(job.choices["experiment"]))
    if not path.is_file():
        return  # put there one by one, without a sweep
    study = Study.read(path)
    pair = replace(study, arms=list(dict.fromkeys([study.settings.baseline, arm])))
    files = StudyFiles.of_study(job.sweep_dir, pair, Console(stderr=True))
    for run in files.of(arm):
        if run.seed == seed:
            for store in (None, *study.settings.stores_of(arm)):
                pair_of(files, run, store)


def _run_once(s: TrainSettings, job: Job, folder: Path | None, run_one: RunOne) -> int:
    """A run that is finished is not run again; one that died goes on. ``folder``: None = a new
    one."""
    if folder is None:
        return run_one(s, job)
    result = Result.read(folder)
    if result is not None and result.status != "failed":
        print(f"{folder} is {result.status}, val_bpb {result.val_bpb_artifact:.5f}")
        return result.exit_code
    if (folder / CONFIG).is_file():
        s = replace(s, resume=str(folder))
    elif folder.is_dir() and {path.name for path in folder.iterdir()} <= {CHOICES, LOCK}:
        shutil.rmtree(folder)  # it was killed while it took the folder
    return run_one(s, job)


def _run_equal_steps(s: TrainSettings, job: Job, arm: Path, result: Result, run_one: RunOne) -> int:
    """The arm's baseline, by steps and not by the clock: what the same updates give without QAT."""
    assert result.steps is not None
    group = s.logger.group or s.sweep_name
    again = replace(
        s,
        qat=QatSettings(enabled=False),
        budget_seconds=None,
        max_steps=result.steps,
        schedule=replace(s.schedule, update_price=1.0, qat_update_price=1.0),
        run_name=EQUAL_STEPS,
        fork=ForkSettings(),
        logger=replace(s.logger, group=group),
    )
    choices = {**job.choices, "qat": "none", "arm": None}
    asked = [*job.overrides, "qat=none", "budget_seconds=null", f"max_steps={result.steps}",
             "schedule.update_price=1.0", "schedule.qat_update_price=1.0"]  # fmt: skip
    again_job = replace(job, choices=choices, overrides=asked, sweep_dir=arm)
    return _run_once(again, again_job, arm / EQUAL_STEPS, run_one)
