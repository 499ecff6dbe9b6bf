"""Weights & Biases: the same numbers under the same names, offline unless asked otherwise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from qat.settings.schema import TrainSettings
from qat.study.result import Result


def wandb_logger(
    folder: Path, s: TrainSettings, row: Result, sweep_dir: Path | None
) -> WandbLogger:
    """One W&B run in the run's folder; group = the sweep, tags = arm and seed beside the user's."""
    group = s.logger.group or (sweep_dir.name if sweep_dir else None)
    return WandbLogger(
        project=s.logger.project,
        name=folder.name,
        save_dir=folder,
        offline=s.logger.offline,
        group=group,
        tags=[row.qat, row.grid, f"seed{row.seed}", *s.logger.tags],
        config=asdict(s),
    )


def finish_wandb(logger: WandbLogger, row: Result) -> None:
    """Put the row into the run's summary and close the run."""
    summary = {key: value for key, value in asdict(row).items() if key != "settings"}
    logger.experiment.summary.update(summary)
    logger.experiment.finish(exit_code=row.exit_code)
