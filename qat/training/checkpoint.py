"""A run's state on disk: what another process needs to go on with the same bits.

Tensors and plain values only, read with ``weights_only``; written under another name, synced and
renamed, so that a crash at any moment leaves the last complete one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from qat.artifact.container import whole_file
from qat.errors import TrainingError, UserError
from qat.training.loop import TrainingLoop, UpdateHook

log = logging.getLogger("qat")


MARKS = {"weights", "progress"}  # by these a checkpoint is told from other torch files


class KeptCheckpoints(UpdateHook):
    """Calls ``write`` with the number of updates and the loop's state after each of ``steps``."""

    def __init__(self, write: Callable[[int, dict[str, Any]], None], steps: Iterable[int]) -> None:
        self.write, self.steps = write, frozenset(steps)

    def before_next_update(self, loop: TrainingLoop) -> None:
        if (step := loop.progress.step) in self.steps:
            loop.clock.pause()
            loop.write_losses()
            self.write(step, loop.state())
            loop.clock.start()


class Checkpoints(UpdateHook):
    """Calls ``write`` with the loop's state now and then, when it is asked to stop, and at the
    end; off the clock. Rank 0's clock decides, so that all ranks agree."""

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        every_steps: int | None = None,
        every_seconds: float | None = None,
    ) -> None:
        self.write, self.every_steps, self.every_seconds = write, every_steps, every_seconds
        self.last_seconds = 0.0

    def prime(self, loop: TrainingLoop) -> None:
        self.last_seconds = loop.progress.elapsed_seconds

    def is_due(self, step: int, elapsed_seconds: float) -> bool:
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        passed = elapsed_seconds - self.last_seconds
        return by_steps or (self.every_seconds is not None and passed >= self.every_seconds)

    def before_next_update(self, loop: TrainingLoop) -> None:
        p = loop.progress
        if loop.clock.stop_agreed or self.is_due(p.step, p.elapsed_seconds):
            loop.clock.pause()
            loop.write_losses()
            self.write(loop.state())
            self.last_seconds = p.elapsed_seconds
            loop.clock.start()

    def after_training(self, loop: TrainingLoop) -> None:
        self.write(loop.state())


def tensors_to_store(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and learned scales that a run of this state stores: its average if it has one.

    Scales that ended with QAT, before the last update, are not stored, and so no average of them.
    """
    averages, scales = state["averaging"], state["learned_scales"]
    if averages["weights"]["tensors"]:
        averaged = averages["learned_scales"]["tensors"] if scales else {}
        return averages["weights"]["tensors"], averaged
    return state["weights"], scales


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """TrainingError if the disk does not take it or weights are not finite; the last one stays."""
    for name, weight in state["weights"].items():
        if not bool(weight.isfinite().all()):
            step = state["progress"]["step"]
            raise TrainingError(f"{name} is not finite after step {step}; try lower learning rates")
    try:
        with whole_file(path) as file:
            torch.save(state, file)  # a tensor at a time: whole, it would be in memory twice
    except (OSError, RuntimeError) as error:
        # Told by the disk that it is full, torch says something about positions.
        told = error if isinstance(error, OSError) else error.__context__
        if not isinstance(told, OSError):
            raise
        raise TrainingError(f"cannot write {path}: {told.strerror}; the run stops here") from None


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state; None where there is none, and, with a warning, where it is damaged. UserError if
    the file is whole and something else."""
    if path.is_dir():
        raise UserError(f"{path}: a folder and no checkpoint; remove it to begin anew")
    try:
        if path.exists() and not is_zipfile(path):  # torch would take it for an old pickle
            raise ValueError("not written by torch, or only its beginning")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        log.warning("%s is damaged (%s)", path, reason)
        return None
    if not isinstance(state, dict) or not state.keys() >= MARKS:
        raise UserError(
            f"{path}: a torch file, but no checkpoint of this program; put the run's own there, or "
            "remove it to begin anew"
        )
    for name, weight in state["weights"].items():
        if not bool(weight.isfinite().all()):  # never written here
            raise UserError(f"{path}: {name} is not finite; start the run anew")
    return state
