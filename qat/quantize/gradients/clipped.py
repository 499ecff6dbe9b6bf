"""As identity, but no gradient where the code was clamped (PACT-like, arXiv 1805.06085).

On levels 1 apart that is also the trust mask of QuEST (arXiv 2502.05003), which asks for |seen - w|
of at most half a level. The rest of QuEST, its clip (near ``scale_rule=mse``) and its rotation, is
the grid's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import in_scale_units, round_to_levels


def clip(view: Tensor, scale: Tensor, *, grid: Grid, number: Tensor) -> tuple[Tensor, Tensor]:
    """``number``: so much of the last level's own range is inside."""
    (low, high), margin = grid.table.limits, grid.table.margin
    assert margin is not None
    x = in_scale_units(view, scale)
    inside = (x >= low - margin * number) & (x <= high + margin * number)
    return round_to_levels(x, grid) * scale + 0.0, inside.float()


class Clipped(GradientRule):
    beyond = 1.0  # so much of the last level's own range is inside

    def supports(self, grid: Grid) -> bool:
        plain = grid.code_scale_dtype is None and not grid.refit and not grid.has_tensor_scale
        if grid.scale_floor > 0.0 and grid.scale_rule in ("percentile", "sigma"):
            return False  # under its floor such a grid clamps weights to the clip, not to levels
        return grid.table.margin is not None and grid.range != "asymmetric" and plain

    def see(self, w: Tensor, grid: Grid, **_: Any) -> Seen:
        return Seen(*self.by_group(clip, w, grid, number=self.beyond))


RULE = Clipped
