"""Clipped, and a loss for being between levels (oscillation dampening, arXiv 2203.11086):

    strength * |seen - w|^2  of the weights inside the clip

whose strength rises from 0 at the switch to ``LARGEST`` by a half cosine. ``LARGEST`` is this
project's, not tuned.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from qat.quantize.gradients import Seen
from qat.quantize.gradients.clipped import Clipped
from qat.quantize.grid import Grid

LARGEST = 1e-3


def pull(progress: float) -> float:
    return LARGEST * (1.0 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Dampen(Clipped):
    anneals = True
    pulls = True
    strength = 1.0
    takes_rotated = False
    beyond = 0.0  # the clip is at the last level

    def before_update(
        self, w: Tensor, gradient: Tensor, seen: Seen, grid: Grid, *,
        progress: float = 0.0, **_: Any,
    ) -> None:  # fmt: skip
        assert seen.slope is not None
        gradient.add_((w - seen.weight).mul_(seen.slope), alpha=2 * self.strength * pull(progress))


RULE = Dampen
