"""Hydra's own sweeper, which checks every job before the first starts. Hydra looks for plugins in
packages of this name alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.settings.command_line import Jobs


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
        folder = Path(config.hydra.sweep.dir)  # asked first: jobs take over the time in its name
        parsed = OverridesParser.create().parse_overrides([*self._parse_config(), *arguments])
        (jobs,) = self.split_arguments(parsed, None)
        configs = [loader.load_sweep_config(config, list(job)) for job in jobs]
        sweep = self.task_function.begin_sweep(folder, config.hydra.launcher._target_, configs)
        super().sweep(arguments)
        self.task_function.end_sweep(sweep)
