"""seen = w, and the loss that rounding at random would add (LOTION, arXiv 2510.08757):

    strength/2 * sum of curvature * (w - below) * (above - w)

``below`` and ``above`` are the neighbouring levels: the product is the variance of rounding to them
at random without bias. A weight's curvature is the running mean of its squared gradients (the
diagonal of the empirical Fisher); the gradient takes it for a constant, as in the paper. No forward
pass sees the grid. The memory and the strength are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, in_scale_units, scales_of

MEMORY = 0.95


class Lotion(GradientRule):
    is_on_grid = False
    pulls = True
    strength = 1.0
    takes_rotated = False

    def __init__(self) -> None:
        self.curvature: dict[str, Tensor] = {}

    def see(self, w: Tensor, grid: Grid, **_: Any) -> Seen:
        return Seen(w.clone())

    def before_update(
        self, w: Tensor, gradient: Tensor, seen: Seen, grid: Grid, *, name: str = "", **_: Any
    ) -> None:
        square = gradient.square()
        if name in self.curvature:
            square = self.curvature[name].lerp(square, 1.0 - MEMORY)
        self.curvature[name] = square
        low, high = grid.table.limits

        def of_group(view: Tensor, scale: Tensor) -> tuple[Tensor]:
            x = in_scale_units(view, scale)
            inside = (x > low) & (x < high)
            return ((1.0 - 2.0 * (x - x.floor())) * scale * inside,)  # d variance / d w

        (slope,) = by_group(of_group, w, scales_of(w, grid), grid)
        gradient.addcmul_(square, slope, value=self.strength / 2)

    def state(self) -> dict[str, Tensor]:
        return self.curvature

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.curvature = {name: torch.clone(tensor) for name, tensor in state.items()}


RULE = Lotion
