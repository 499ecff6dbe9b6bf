"""seen = a smooth staircase of w/scale, dL/dw scaled by its slope (arXiv 2006.09952).

It hardens from nearly linear at the switch to nearly rounding at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import in_scale_units

COLDEST = 0.05


def temperature(progress: float) -> float:
    """1 at the switch, falling geometrically to ``COLDEST`` at the end."""
    return COLDEST ** min(max(progress, 0.0), 1.0)


def soften(view: Tensor, scale: Tensor, *, grid: Grid, number: Tensor) -> tuple[Tensor, Tensor]:
    """A smooth staircase through the half-integers, and its slope; ``number`` is a temperature."""
    low, high = grid.table.limits
    x = in_scale_units(view, scale)
    inside = (x >= low - 0.5) & (x <= high + 0.5)
    floor = x.floor()
    tanh = torch.tanh((x - floor - 0.5) / number)
    height = 2 * torch.tanh(0.5 / number)
    soft, slope = floor + 0.5 + tanh / height, (1 - tanh.square()) / (number * height)
    return soft.clamp(low, high) * scale, slope * inside


class SoftRound(GradientRule):
    is_on_grid = False
    anneals = True

    def see(self, w: Tensor, grid: Grid, *, progress: float = 0.0, **_: Any) -> Seen:
        return Seen(*self.by_group(soften, w, grid, number=temperature(progress)))


RULE = SoftRound
