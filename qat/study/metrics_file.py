"""``metrics.csv``: a row per step, appended; a resumed run goes on where its checkpoint was."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from qat.errors import TrainingError
from qat.study.run_folder import read_metrics, write_atomically

COLUMNS = ("step", "train_loss", "elapsed_seconds", "rate", "qat_on")


class MetricsFile(Logger):
    """Keeps the rows up to ``first_step`` of an earlier process and appends to them."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self._path = path
        kept = []
        if path.is_file():
            kept = [row for row in read_metrics(path) if int(row["step"]) <= first_step]
        lines = [",".join(COLUMNS), *(",".join(row[key] for key in COLUMNS) for row in kept)]
        write_atomically(path, "\n".join(lines) + "\n")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """TrainingError if the row cannot be written."""
        try:
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow({"step": step, **metrics})
        except OSError as error:
            raise TrainingError(f"cannot write {self._path}: {error.strerror}") from None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings are in the run's config.yaml."""
