"""A Hydra launcher whose runs take all ranks of this machine, one after another, by torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher

from qat.settings.command_line import Jobs

# By name: studies are no part of train_gpt.py, where Hydra finds this file too.
STUDY, SWEEP_RUN = "qat.study.study", "qat.study.sweep_run"
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class NodeLauncher(BasicLauncher):
    """``ranks``: of each run. What a study makes of a run that has its row is done here."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def setup(self, *, task_function: Any, **others: Any) -> None:
        self.jobs: Jobs = task_function
        super().setup(task_function=task_function, **others)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        # Here, since it imports torch, and Hydra imports this file at every start.
        from qat.runs.result import Result

        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        returned: list[Any] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            name = _name(overrides)
            row = Result.read(folder / name) if name else None
            if row is None or row.status == "failed":
                code = exit_code(self.command(folder, name, overrides))
                row = Result.read(folder / name) if name else None
                self.jobs.exit_codes.append(code)
                if code:
                    print(f"{name or ' '.join(overrides)}: exit code {code}", file=sys.stderr)
            if row is not None and row.status != "failed":
                returned += super().launch([overrides], number)
        return returned

    def command(self, folder: Path, name: str | None, overrides: Sequence[str]) -> list[str]:
        """That trains one run in the sweep's ``folder``, or goes on with it."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, f"--nproc_per_node={self.ranks}", str(TRAIN)]
        if name is not None and (folder / name / "config.yaml").is_file():
            return [*start, f"resume={folder / name}"]
        typed = _typed(overrides)
        trunk, step = typed.get("fork.run"), int(typed.get("fork.step", 0))
        if trunk and import_module(SWEEP_RUN).is_lost(folder, trunk, step, name):
            overrides = [
                word for word in overrides if not word.startswith(("fork.run=", "fork.step="))
            ]
        named = [f"run_name={name}"] if name is not None else []
        return [*start, *overrides, f"runs_dir={folder}", *named]


def exit_code(command: list[str]) -> int:
    """Of a process that does not outlive this one, and has time to save."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _typed(overrides: Sequence[str]) -> dict[str, str]:
    return dict(override.partition("=")[::2] for override in overrides)


def _name(overrides: Sequence[str]) -> str | None:
    """Of a study's run; others take a name of their own."""
    typed = _typed(overrides)
    if "arm" not in typed:
        return None
    name: str = import_module(STUDY).run_name(typed["arm"], int(typed["seed"]))
    return name
