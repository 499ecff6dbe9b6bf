"""seen = a smooth staircase of w/scale, dL/dw scaled by its slope (arXiv 2006.09952).

It hardens from nearly linear at the switch to nearly rounding at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, in_scale_units, scales_of

COLDEST = 0.05


def temperature(progress: float) -> float:
    """1 at the switch, falling geometrically to ``COLDEST`` at the end."""
    return COLDEST ** min(max(progress, 0.0), 1.0)


def _soft_round(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A smooth staircase through the half-integers, and its slope."""
    floor = x.floor()
    tanh = torch.tanh((x - floor - 0.5) / temperature)
    height = 2 * math.tanh(0.5 / temperature)
    return floor + 0.5 + tanh / height, (1 - tanh.square()) / (temperature * height)


class SoftRound(GradientRule):
    is_on_grid = False
    anneals = True

    def see(self, w: Tensor, grid: Grid, *, progress: float = 0.0, **_: Any) -> Seen:
        low, high = grid.table.limits

        def of_group(view: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = in_scale_units(view, scale)
            inside = (x >= low - 0.5) & (x <= high + 0.5)
            soft, slope = _soft_round(x, temperature(progress))
            return soft.clamp(low, high) * scale, slope * inside

        return Seen(*by_group(of_group, w, scales_of(w, grid), grid))


RULE = SoftRound
