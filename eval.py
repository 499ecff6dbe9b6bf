"""Tasks on finished runs and artifacts.

    python eval.py artifact=logs/runs/RUN/artifact.qat
    python eval.py run=RUN eval=full
    python eval.py task=cabinet run=RUN
    python eval.py task=cabinet model=DIR task_data=FILE.jsonl
    python eval.py task=inspect artifact=PATH
    python eval.py task=fill run=RUN limit_bytes=1000000
    python eval.py task=sample artifact=PATH prompt="In the beginning"
    python eval.py task=audit data.train_files=GLOB data.val_files=GLOB data.tokenizer=PATH
    python eval.py task=report runs='logs/runs/*'
    python eval.py task=choose cabinet=FOLDER 'constraints={latency_ms: 10}'
    python eval.py task=export run=RUN out=FILE.gguf
    python eval.py task=submission run=RUN out=DIR

Each task is imported only when asked for: those that are not needed to score are in no
``train_gpt.py`` (``qat/golf/bundle.py``).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module

from qat.budget.budget import Budget
from qat.errors import UserError
from qat.golf.bundle import count_code_bytes
from qat.settings.checks import resolve_eval
from qat.settings.command_line import Job, Program, main
from qat.settings.schema import EvalTaskSettings, require

GOLF_MODULE, GOLF_SUFFIX = "qat.golf.ptz_model", ".ptz"  # imported by name: see above
RUNS_TEXT = "qat.runs.text_of_run"
FULL = "qat.analysis.full_task"  # task=score, in more respects than val_bpb
TASKS = {
    "score": "qat.evaluation.score_task",
    "sample": "qat.evaluation.sample_task",
    "inspect": "qat.evaluation.inspect_task",
    "fill": "qat.runs.fill_task",
    "audit": "qat.evaluation.audit_task",
    "cabinet": "qat.cabinet.cabinet_task",
    "choose": "qat.cabinet.choose_task",
    "export": "qat.export.export_task",
    "submission": "qat.golf.submission_task",
    "report": "qat.report.report_task",
}


def resolve(settings: EvalTaskSettings, choices) -> EvalTaskSettings:
    require(settings.task in TASKS, "task", settings.task, f"choose from {', '.join(TASKS)}")
    s = resolve_eval(settings, choices)
    return replace(s, data=import_module(RUNS_TEXT).text_of_run(s.run, s.data)) if s.run else s


def run(s: EvalTaskSettings, job: Job) -> int:
    of_checkpoint = (s.artifact or "").endswith(".ckpt")
    in_full = s.task == "score" and (s.eval.parts or of_checkpoint)
    reader = (GOLF_MODULE,) if (s.artifact or "").endswith(GOLF_SUFFIX) else ()
    budget = Budget(s.limit_bytes, count_code_bytes(reader))
    try:
        return import_module(FULL if in_full else TASKS[s.task]).run(s, budget)
    except ModuleNotFoundError as missing:
        if not str(missing.name).startswith("qat."):
            raise
        raise UserError(
            f"task={s.task} artifact={s.artifact}: train_gpt.py scores .qat files only; "
            "this takes the whole project"
        ) from None


PROGRAM = Program("eval", resolve, run)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
