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
from qat.quantize.rounding import in_scale_units

MEMORY = 0.95


def look_around(
    view: Tensor, scale: Tensor, gradient: Tensor, before: Tensor, *, grid: Grid, number: Tensor
) -> tuple[Tensor, Tensor]:
    """The curvature, of which this update's is the share ``number``; times d variance / d w."""
    low, high = grid.table.limits
    curvature = before + number * (gradient.square() - before)
    x = in_scale_units(view, scale)
    inside = (x > low) & (x < high)
    return curvature, curvature * (1.0 - 2.0 * (x - x.floor())) * scale * inside


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
        before, share = self.curvature.get(name), 1.0 - MEMORY
        if before is None:
            before, share = torch.zeros_like(w), 1.0
        others = gradient, before
        self.curvature[name], slope = self.by_group(look_around, w, grid, *others, number=share)
        gradient.add_(slope, alpha=self.strength / 2)

    def state(self) -> dict[str, Tensor]:
        return self.curvature

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.curvature = {name: torch.clone(tensor) for name, tensor in state.items()}


RULE = Lotion
