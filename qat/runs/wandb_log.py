"""Weights & Biases: the same numbers under the same names, offline unless asked otherwise.

One W&B run per training run, job type "train", grouped by study (the sweep's name). ``wandb sync``
uploads what was logged offline. Left out: a resumed run is a second W&B run, because syncing one id
from two folders keeps the later rows only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from pydantic import ValidationError
from wandb.sdk.lib.service.service_connection import WandbApiFailedError
from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from qat.errors import UserError
from qat.runs.result import Result
from qat.settings.schema import MAX_TAG_LENGTH, LoggerSettings, TrainSettings

log = logging.getLogger("qat")
TRAIN_JOB = "train"
GONE = (wandb.errors.Error, ConnectionError, MailboxClosedError, HandleAbandonedError)


@contextmanager
def refusals_named() -> Iterator[None]:
    """UserError in one line instead of W&B's own errors: no login, no network, no permission."""
    try:
        yield
    except ValidationError as error:  # of a variable WANDB_...
        wrong = error.errors()[0]
        reason = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        raise UserError(f"logger=wandb: a variable WANDB_... is wrong ({reason})") from None
    except (wandb.errors.Error, WandbApiFailedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"logger=wandb: W&B refused ({reason}); run `wandb login`, or log with "
            "logger.offline=true and `wandb sync` later"
        ) from None


def check_login(s: LoggerSettings) -> None:
    """Before a run takes its folder. UserError if a variable of W&B is wrong, or if it is to be
    reached and cannot be, or does not know who asks."""
    for name in sorted(name for name in os.environ if name.startswith("WANDB_")):
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"logger=wandb: {name}={os.environ[name]}: {reason}") from None
    if left := os.environ.get(
        "WANDB_SERVICE"
    ):  # of the process that started this one, or a shell's
        try:
            wandb.setup()
        except (ValueError, OSError, WandbServiceConnectionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"logger=wandb: WANDB_SERVICE={left}: {reason}; unset it") from None
    if not s.offline:
        with refusals_named():
            wandb.Api()


def mode(s: LoggerSettings) -> Literal["online", "offline"]:
    """The setting decides, whatever WANDB_MODE says."""
    chosen: Literal["online", "offline"] = "offline" if s.offline else "online"
    if os.environ.get("WANDB_MODE", chosen) != chosen:
        log.info("W&B: %s, as logger.offline says and WANDB_MODE does not", chosen)
    return chosen


class OutlivedLogger(WandbLogger):
    """W&B's process may end before the run does (SLURM signals every process of a job): the run
    goes on without it."""

    is_lost = False

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        try:
            yield
        except GONE as error:
            self.is_lost = True
            log.warning("W&B is gone (%s); metrics.csv and result.json have it all", error)
            with suppress(*GONE):  # so that it is not said once more at the end
                wandb.teardown()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.is_lost:
            with self._outlived():
                super().log_metrics(metrics, step)

    def finish(self, row: Result, exit_code: int) -> None:
        """Put the row into the run's summary and close the run."""
        if not self.is_lost:
            with self._outlived():
                summary = {key: value for key, value in asdict(row).items() if key != "settings"}
                self.experiment.summary.update(summary)
                self.experiment.finish(exit_code=exit_code)


def wandb_logger(
    folder: Path, s: TrainSettings, row: Result, sweep_dir: Path | None
) -> OutlivedLogger:
    """Starts a W&B run in the run's folder. Tags: arm, seed, grid and the user's; UserError if W&B
    refuses it."""
    arm = row.arm or row.qat
    own_tags = [tag[:MAX_TAG_LENGTH] for tag in (arm, f"seed{row.seed}", row.grid)]
    logger = OutlivedLogger(
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
