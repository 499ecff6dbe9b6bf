"""``train.py resume=RUN``: the run's own settings, and nothing else from the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qat.errors import UserError
from qat.runs.result import Result
from qat.runs.run_folder import read_config
from qat.settings.checks import find_run
from qat.settings.schema import TrainSettings, from_yaml

if TYPE_CHECKING:
    from qat.settings.command_line import Job


def saved_settings(asked: TrainSettings) -> tuple[TrainSettings, dict[str, str | None]]:
    """Settings and options (group -> option) of the run that ``asked.resume`` names."""
    assert asked.resume
    folder = find_run("resume", asked.resume, asked.runs_dir)
    yaml, choices = read_config(folder)
    return replace(from_yaml(yaml, f"resume={folder}"), resume=str(folder)), choices


def saved_job(folder: str, job: Job) -> Job:
    """The job as it was first asked for. UserError if it is asked for differently now."""
    known = ("resume=", "runs_dir=")
    if more := [override for override in job.overrides if not override.startswith(known)]:
        raise UserError(f"resume={folder}: takes everything from that run; drop {more[0]}")
    return replace(job, choices=read_config(Path(folder))[1])


def is_finished(folder: str) -> bool:
    """Says so; a failed or interrupted run is not."""
    result = Result.read(Path(folder))
    if result is None or result.status == "failed":
        return False
    print(f"{folder} is finished ({result.status}), val_bpb {result.val_bpb_artifact:.5f}")
    return True
