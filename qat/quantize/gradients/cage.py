"""Straight-through, and weights drawn to what is seen of them (CAGE, arXiv 2510.18784):

    w <- w - rate * (update of the optimizer + strength * (w - seen))

decoupled from the optimizer as weight decay is. The strength is 0 for the first half of the time
after the switch and then rises to ``LARGEST``: these two numbers are this project's, not tuned.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat.quantize.gradients import Seen
from qat.quantize.gradients.identity import Identity
from qat.quantize.grid import Grid

SILENT = 0.5  # share of the time after the switch
LARGEST = 10.0


def pull(progress: float) -> float:
    return LARGEST * max(0.0, (progress - SILENT) / (1.0 - SILENT))


class Cage(Identity):
    anneals = True
    pulls = True
    strength = 1.0

    def before_update(
        self, w: Tensor, gradient: Tensor, seen: Seen, grid: Grid, *,
        rate: float, progress: float = 0.0, **_: Any,
    ) -> None:  # fmt: skip
        share = min(rate * self.strength * pull(progress), 1.0)  # not beyond what is seen
        w.lerp_(seen.weight, share)


RULE = Cage
