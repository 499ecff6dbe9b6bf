"""Hydra's own sweeper, which checks every job before the first starts and gives launchers what they
need. Hydra looks for plugins in packages of this name alone."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.errors import UserError
from qat.settings.arguments import check_settings
from qat.settings.command_line import Jobs

# It listens on loopback alone, and sends its makers no report of its use.
RAY_KEEPS_TO_ITSELF = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


ONE_AFTER_ANOTHER = ("basic", "node")  # launchers that start a job when the one before has ended


def batches_of(after: Sequence[int | None], in_turn: bool) -> list[list[int]]:
    """Numbers of jobs in batches that follow one another: ``after`` says which job each has to wait
    for. In turn one batch will do: its jobs in their order, but for those that have to wait."""
    batches: list[list[int]] = []
    done: set[int | None] = {None}
    while len(done) <= len(after):
        batch: list[int] = []
        for number, first in enumerate(after):
            if number not in done and (first in done or (in_turn and first in batch)):
                batch.append(number)
        batches.append(batch)
        done |= set(batch)
    return [[number for batch in batches for number in batch]] if in_turn else batches


def _stop_launched() -> None:
    """submitit's jobs outlive the command that launched them, and its launcher keeps no list:
    they are looked for. Here they are asked to save and stop, on a cluster they are cancelled."""
    submitit = sys.modules.get("submitit")
    if submitit is None:
        return
    jobs = [thing for thing in gc.get_objects() if issubclass(type(thing), submitit.Job)]
    here = {job._process for job in jobs if getattr(job, "_process", None) is not None}
    for process in here:
        process.terminate()
    for process in here:
        process.wait()
    for job in jobs:
        if not here:
            job.cancel(check=False)


class CheckedSweeper(BasicSweeper):
    def setup(self, *, task_function: Any, **others: Any) -> None:
        self.task_function: Jobs = task_function
        self.batches: list[list[list[str]]] = []
        super().setup(task_function=task_function, **others)

    def split_arguments(self, overrides: Any, max_batch_size: Any) -> Any:  # type: ignore[override]
        """Into batches that are launched one after another; as planned, once they are."""
        return self.batches or super().split_arguments(overrides, max_batch_size)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Done in ``sweep``, which composes each job for its check."""

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None
        assert self.hydra_context is not None
        config, loader = self.config, self.hydra_context.config_loader
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher == "parallel":
            self.max_batch_size = self.max_batch_size or 2  # submitit starts all it is given
            # Runs that each start a thread for every core take four times as long.
            threads = max(1, (os.cpu_count() or 1) // self.max_batch_size)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        if launcher == "ray_local":
            os.environ.update(RAY_KEEPS_TO_ITSELF)
        if config.hydra.launcher._target_.endswith(".SlurmLauncher") and which("srun") is None:
            raise UserError("hydra/launcher: no srun here; give the command where SLURM is")
        if launcher == "node" and config.get("ledger") == "full":
            raise UserError(
                "ledger=full: by hydra/launcher=node its runs of equal steps would have one rank; "
                "give ledger=estimate"
            )
        check_settings(self._parse_config(), config.hydra.job.config_name)
        folder = Path(config.hydra.sweep.dir)  # asked first: jobs take over the time in its name
        parser = OverridesParser.create(loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        for asked in overrides:
            if not asked.is_sweep_override():
                continue
            try:
                values = list(asked.sweep_string_iterator())
            except ValueError as error:  # range(1,2,0)
                raise UserError(f"{asked.input_line}: {error}") from None
            if not values:
                raise UserError(f"{asked.input_line}: no values, so nothing to run")
            if twice := [value for n, value in enumerate(values) if value in values[:n]]:
                raise UserError(f"{asked.get_key_element()}={twice[0]}: given twice; give it once")
        (jobs,) = self.split_arguments(overrides, None)
        configs = [loader.load_sweep_config(config, list(job)) for job in jobs]
        sweep, starts = self.task_function.begin_sweep(folder, configs)
        in_turn = launcher in ONE_AFTER_ANOTHER
        for numbers in batches_of([start.after for start in starts], in_turn):
            started = [[*jobs[number], *starts[number].overrides] for number in numbers]
            self.batches += self.split_overrides_to_chunks(started, self.max_batch_size)
        try:
            super().sweep(arguments)
        except BaseException:
            _stop_launched()
            raise
        self.task_function.end_sweep(sweep)
