"""Hydra's own sweeper, which checks every job before the first starts and gives launchers what they
need. Hydra looks for plugins in packages of this name alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.errors import UserError
from qat.settings.command_line import Jobs

# It listens on loopback alone, and sends its makers no report of its use.
RAY_KEEPS_TO_ITSELF = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class CheckedSweeper(BasicSweeper):
    def setup(self, *, task_function: Any, **others: Any) -> None:
        self.task_function: Jobs = task_function
        super().setup(task_function=task_function, **others)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Done in ``sweep``, which composes each job for its check."""

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None
        assert self.hydra_context is not None
        config, loader = self.config, self.hydra_context.config_loader
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher == "parallel" and self.max_batch_size is None:
            self.max_batch_size = 2  # submitit starts all it is given: give it pairs
        if launcher == "ray_local":
            os.environ.update(RAY_KEEPS_TO_ITSELF)
        if config.hydra.launcher._target_.endswith(".SlurmLauncher") and which("srun") is None:
            raise UserError("hydra/launcher: no srun here; give the command where SLURM is")
        folder = Path(config.hydra.sweep.dir)  # asked first: jobs take over the time in its name
        parser = OverridesParser.create(loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        for asked in overrides:
            values = list(asked.sweep_string_iterator()) if asked.is_sweep_override() else []
            if twice := [value for n, value in enumerate(values) if value in values[:n]]:
                raise UserError(f"{asked.get_key_element()}={twice[0]}: given twice; give it once")
        (jobs,) = self.split_arguments(overrides, None)
        configs = [loader.load_sweep_config(config, list(job)) for job in jobs]
        sweep = self.task_function.begin_sweep(folder, configs)
        super().sweep(arguments)
        self.task_function.end_sweep(sweep)
