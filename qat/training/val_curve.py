"""The validation curve: weights scored at the end of each of some equal parts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from qat.training.loop import TrainingLoop, UpdateHook

COLUMNS = ("step", "elapsed_seconds", "val_bpb_float", "val_bpb_snapped")


class ValidationCurve(UpdateHook):
    """Off the clock. ``score``: weights -> val_bpb, a collective call; ``write`` takes the numbers
    of a row, and the step. A file's weights are scored too while QAT is on."""

    def __init__(
        self,
        points: int,
        score: Callable[[Mapping[str, Tensor]], float],
        write: Callable[[dict[str, float], int], None],
    ) -> None:
        self.points, self.score, self.write = points, score, write
        self.scored = 0

    def prime(self, loop: TrainingLoop) -> None:
        self.scored = self._ended(loop)

    def before_next_update(self, loop: TrainingLoop) -> None:
        if self._ended(loop) > self.scored:
            loop.clock.pause()
            self._add_point(loop)
            loop.clock.start()

    def after_training(self, loop: TrainingLoop) -> None:
        if self.points:
            self._add_point(loop)

    def _ended(self, loop: TrainingLoop) -> int:
        """Parts that are over."""
        return math.floor(self.points * loop.done)

    def _add_point(self, loop: TrainingLoop) -> None:
        self.scored = self._ended(loop)
        p, plan = loop.progress, loop.switch.plan
        row = {"elapsed_seconds": p.elapsed_seconds, "val_bpb_float": self.score(loop.masters)}
        if loop.model.is_on:
            snapped = plan.snap(loop.masters, loop.switch.learned_scales)
            row["val_bpb_snapped"] = self.score(snapped)
        self.write(row, p.step)
