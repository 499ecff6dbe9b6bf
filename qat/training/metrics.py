"""Losses of the last steps, kept on the device until it is time to write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qat.errors import TrainingError


class PendingMetrics:
    """Reading a loss waits for the GPU, so it is done for many steps at once."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._losses: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, loss: Tensor, values: dict[str, float]) -> None:
        self._rows.append((step, values))
        self._losses.append(loss)

    def write(self, loggers: Sequence[Any]) -> float:
        """Give all to Lightning's loggers, averaged over ranks (a collective call); the last loss.

        TrainingError names the first step whose loss is not finite.
        """
        losses = torch.stack(self._losses).double()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        values = losses.tolist()
        for (step, row), loss in zip(self._rows, values, strict=True):
            for logger in loggers:
                logger.log_metrics({"train_loss": loss} | row, step=step)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"train loss is {loss} at step {step}; try lower learning rates"
                )
        self._rows.clear()
        self._losses.clear()
        return values[-1]
