"""The wallclock that decides everything: rate, QAT switch and stop.

It counts training only (data loading included); it stands still during priming, validation and
export. All ranks use rank 0's reading, agreed once per step, so they take equal decisions.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from qat.settings import machine


class TrainingClock:
    """Seconds of training so far. ``agree`` is a collective call.

    Rank 0's ``stop_requested`` (a signal sets it to its number, at any time) travels with its
    reading and is ``stop_agreed`` on every rank after it.
    """

    def __init__(self, already_seconds: float = 0.0) -> None:
        self._banked_seconds = already_seconds
        self._started_at: float | None = None
        self.stop_requested = self.stop_agreed = 0
        self._group: dist.ProcessGroup | None = None

    def start(self) -> None:
        """Start or go on. The reading travels over gloo, so that agreeing never waits for a GPU."""
        if dist.is_initialized() and self._group is None and dist.get_world_size() > 1:
            with machine.ranks_meet():
                self._group = dist.new_group(backend="gloo")
        self._started_at = time.perf_counter()

    def pause(self) -> None:
        self._banked_seconds, self._started_at = self._local_seconds(), None

    def _local_seconds(self) -> float:
        running = 0.0 if self._started_at is None else time.perf_counter() - self._started_at
        return self._banked_seconds + running

    def agree(self) -> float:
        """Rank 0's elapsed seconds, on every rank."""
        if self._group is None:
            self.stop_agreed = self.stop_requested
            return self._local_seconds()
        reading = torch.tensor([self._local_seconds(), self.stop_requested], dtype=torch.float64)
        dist.broadcast(reading, src=0, group=self._group)
        self.stop_agreed = int(reading[1])
        return float(reading[0])
