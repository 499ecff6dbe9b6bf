"""Tasks on finished runs and artifacts.

    python eval.py artifact=logs/runs/RUN/artifact.qat
    python eval.py task=sample artifact=PATH prompt="In the beginning"
    python eval.py task=report runs='logs/runs/*'

Each task is imported only when asked for: what ``artifact=`` imports is the code that is counted.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from qat.errors import UserError
from qat.settings.checks import resolve_eval
from qat.settings.command_line import Job, Program, main, say_error
from qat.settings.schema import EvalTaskSettings

ARTIFACT_TASKS = {"score": "qat.evaluation.score_task", "sample": "qat.evaluation.sample_task"}


def artifact_path(s: EvalTaskSettings) -> Path:
    """The file that ``artifact=`` or ``run=`` names."""
    if s.artifact:
        return Path(s.artifact)
    assert s.run
    folder = next((p for p in (Path(s.run), Path(s.runs_dir) / s.run) if p.is_dir()), None)
    if folder is None:
        raise UserError(f"run={s.run}: no such folder, here or in {s.runs_dir}")
    found = sorted(folder.glob("artifact.qat*"))
    if not found:
        raise UserError(f"run={s.run}: {folder} holds no artifact; did the run finish?")
    return found[0]


def run(s: EvalTaskSettings, job: Job) -> int:
    try:
        if s.task == "report":
            import_module("qat.study.report").report(s.runs)
            return 0
        return import_module(ARTIFACT_TASKS[s.task]).run(s, artifact_path(s))
    except UserError as error:
        say_error(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Program("eval", resolve_eval, run)))
