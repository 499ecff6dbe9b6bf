"""``eval.py task=fill run=RUN limit_bytes=N``: a finished run stored again, filling another limit.

The run's own file stays as it is; the new one is read back and scored.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qat.artifact.container import OVERSIZE_SUFFIX
from qat.errors import UserError
from qat.runs.result import Result
from qat.runs.run_folder import EXPORTS, check_writable
from qat.runs.store_again import FinishedRun
from qat.runs.training_run import OVERSIZE_EXIT_CODE
from qat.settings.schema import ArtifactSettings

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings


def run(s: EvalTaskSettings, budget: Budget) -> int:
    assert s.run is not None  # asked for by the checks of the settings
    folder = Path(s.run)
    result = Result.read(folder)
    if result is None:
        raise UserError(f"run={folder}: the run did not finish")
    finished = FinishedRun(folder, result, Console(stderr=True))
    out = Path(s.out or folder / EXPORTS / f"fill_{s.limit_bytes}.qat")
    for path in (out, Path(f"{out}{OVERSIZE_SUFFIX}")):
        if os.path.exists(path):
            raise UserError(f"out={path}: it is there already; give another name")
    log = logging.getLogger("qat")
    log.handlers[:] = [logging.StreamHandler()]
    log.setLevel(logging.INFO)
    log.disabled = False  # Hydra disables loggers that it did not configure
    check_writable(out.parent, f"out={out}")  # before minutes are spent
    artifact = replace(ArtifactSettings(**result.settings["artifact"]), fill=True)
    done, score = finished.store(finished.plan, artifact, budget, out)
    print(f"artifact       {done.path}")
    print(f"val_bpb        {score.val_bpb:.10f}")
    print(f"val_loss       {score.val_loss:.10f}")
    print(f"artifact_bytes {done.artifact_bytes}")
    print(f"code_bytes     {budget.code_bytes}")
    print(f"total_bytes    {done.artifact_bytes + budget.code_bytes}")
    print(f"limit_bytes    {budget.limit_bytes}")
    return OVERSIZE_EXIT_CODE if done.is_oversize else 0
