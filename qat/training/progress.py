"""Where a run is, and when that is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where a run is. ``qat_first_step`` is the number (from 1) of the first update with QAT on."""

    step: int = 0
    elapsed_seconds: float = 0.0
    train_loss: float = float("nan")
    qat_first_step: int | None = None
    qat_last_step: int | None = None
    qat_steps: int = 0


@dataclass
class Checkpointing:
    """When to call ``write``; rank 0's clock decides, so that all ranks agree."""

    write: Callable[[dict[str, Any]], None]
    every_steps: int | None = None
    every_seconds: float | None = None
    last_seconds: float = 0.0

    def is_due(self, step: int, elapsed_seconds: float) -> bool:
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        passed = elapsed_seconds - self.last_seconds
        return by_steps or (self.every_seconds is not None and passed >= self.every_seconds)
