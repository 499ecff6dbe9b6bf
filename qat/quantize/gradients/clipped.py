"""As identity, but no gradient where the code was clamped (PACT-like, arXiv 1805.06085)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, encode, in_scale_units, round_to_levels


class Clipped(GradientRule):
    def see(self, w: Tensor, grid: Grid, **_: Any) -> Seen:
        low, high = grid.table.limits

        def of_group(view: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = in_scale_units(view, scale)
            inside = (x >= low - 0.5) & (x <= high + 0.5)
            return round_to_levels(x, grid) * scale + 0.0, inside.float()

        return Seen(*by_group(of_group, w, encode(w, grid).scales, grid))


RULE = Clipped
