"""seen = a staircase of w/scale that steepens from w itself to rounding (PARQ, arXiv 2503.15748).

The proximal map of a piecewise affine regularizer: between two levels a line through their middle,
cut off at both, whose slope grows from 1 at the switch without end. dL/dw = dL/dseen, since the
optimizer moves what the map is applied to. As in torchao the inverse of the slope falls along a
sigmoid; it is 0 from ``HARD`` on, so the last updates see the grid itself.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import in_scale_units, snap

STEEPNESS = 10.0  # of the sigmoid
HARD = 0.9  # share of the time after the switch


def inverse_slope(progress: float) -> float:
    """1 at the switch, 0 from ``HARD`` on."""
    done = max(progress, 0.0) / HARD
    if done >= 1.0:
        return 0.0
    first, last = (1 / (1 + math.exp(sign * STEEPNESS / 2)) for sign in (-1, 1))
    return (1 / (1 + math.exp(STEEPNESS * (done - 0.5))) - last) / (first - last)


def steepen(view: Tensor, scale: Tensor, *, grid: Grid, number: Tensor) -> tuple[Tensor]:
    """``number`` is the inverse of the slope."""
    low, high = grid.table.limits
    x = in_scale_units(view, scale)
    below = x.floor().clamp(low, high - 1)
    part = ((x - below - 0.5) / number + 0.5).clamp(0.0, 1.0)
    return ((below + part) * scale,)


class Parq(GradientRule):
    is_on_grid = False
    anneals = True

    def see(self, w: Tensor, grid: Grid, *, progress: float = 0.0, **_: Any) -> Seen:
        inverse = inverse_slope(progress)
        if inverse == 0.0:
            return Seen(snap(w, grid))
        return Seen(*self.by_group(steepen, w, grid, number=inverse))


RULE = Parq
