"""Weights & Biases: the same numbers under the same names, offline unless asked otherwise.

One W&B run per training run, job type "train", grouped by study (the sweep's name). ``wandb sync``
uploads what was logged offline. Left out: a resumed run is a second W&B run, because syncing one id
from two folders keeps the later rows only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from qat.errors import UserError
from qat.runs.result import Result
from qat.settings.schema import MAX_TAG_LENGTH, LoggerSettings, TrainSettings

TRAIN_JOB = "train"


@contextmanager
def refusals_named() -> Iterator[None]:
    """UserError in one line instead of W&B's own errors: no login, no network, no permission."""
    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"W&B refused ({reason}); run `wandb login`, or log with logger.offline=true and "
            "`wandb sync` later"
        ) from None


def mode(s: LoggerSettings) -> Literal["online", "offline"]:
    """The setting decides, whatever WANDB_MODE says."""
    return "offline" if s.offline else "online"


def wandb_logger(
    folder: Path, s: TrainSettings, row: Result, sweep_dir: Path | None
) -> WandbLogger:
    """Starts a W&B run in the run's folder. Tags: arm, seed, grid and the user's; UserError if W&B
    refuses it."""
    arm = row.arm or row.qat
    own_tags = [tag[:MAX_TAG_LENGTH] for tag in (arm, f"seed{row.seed}", row.grid)]
    logger = WandbLogger(
        project=s.logger.project,
        name=folder.name,
        save_dir=folder.resolve(),  # of another process, whose working folder may be another
        mode=mode(s.logger),
        group=s.logger.group or (sweep_dir.name if sweep_dir else None),
        job_type=TRAIN_JOB,
        tags=list(dict.fromkeys([*own_tags, *s.logger.tags])),  # int6 is an arm and a grid
        config=asdict(s) | {"arm": arm},
    )
    with refusals_named():
        _ = logger.experiment  # starts it now, so that a refusal comes before the training
    return logger


def finish_wandb(logger: WandbLogger, row: Result) -> None:
    """Put the row into the run's summary and close the run."""
    summary = {key: value for key, value in asdict(row).items() if key != "settings"}
    logger.experiment.summary.update(summary)
    logger.experiment.finish(exit_code=row.exit_code)
