"""Learned scales (LSQ, arXiv 1902.08153): clipped, and scales have a gradient of their own,

    dL/dseen * (code - w/scale inside, code at the clamps) / sqrt(N * highest code),

N weights a scale. Tensors on a grid of scale_rule=learned follow it whatever ``qat.gradient`` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import (
    Codes,
    decode,
    group_views,
    in_scale_units,
    products_in_scale_units,
    round_to_levels,
    stored_scales,
)


def clamp(view: Tensor, scale: Tensor, *, grid: Grid, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    low, high = grid.table.limits
    # Without a zero, levels are the middles of equal parts: only beyond the outer parts' ends is a
    # weight clamped (ParetoQ, arXiv 2502.02631).
    beyond = 0.0 if grid.table.has_zero else grid.table.margin or 0.0
    x = in_scale_units(view, scale)
    code = round_to_levels(x, grid)
    inside = (x > low - beyond) & (x < high + beyond)
    slope = (code - x * inside) / math.sqrt(view.size(-1) * high)
    return code * scale + 0.0, inside.float(), slope


class Learned(GradientRule):
    def supports(self, grid: Grid) -> bool:
        return grid.scale_rule == "learned"

    def see(self, w: Tensor, grid: Grid, *, scales: Tensor | None = None, **_: Any) -> Seen:
        """``scale_slope`` is d seen / d scale; of products of scales in units of the product."""
        assert scales is not None
        if grid.column_scales:
            return self._see_products(w, grid, scales)
        return Seen(*self.by_group(clamp, w, grid, scales=scales))

    def _see_products(self, w: Tensor, grid: Grid, scales: Tensor) -> Seen:
        stored = stored_scales(scales, grid)
        x = products_in_scale_units(w, stored)
        codes = round_to_levels(x, grid)
        inside = x.abs() < grid.table.limits[1]
        slope = codes - x * inside
        seen = decode(Codes(grid.table.to_codes(codes).view_as(w), stored), grid)
        return Seen(seen, inside.float().view_as(w), slope.view_as(w))


def sum_per_scale(x: Tensor, grid: Grid, scales: Tensor) -> Tensor:
    """Sum over the weights that share a scale; weight's shape -> (rows, groups) as ``scales``.

    Of products ``x`` is in units of the product: a row's sum goes over its columns' scales, and the
    other way, each over the root of the weights times the highest code (LSQ).
    """
    if grid.column_scales:
        rows = x.size(0) if x.dim() > 1 else 1
        of_rows, of_columns = scales[:rows], scales[rows:]
        matrix, high = x.reshape(rows, -1), grid.table.limits[1]
        by_row = (matrix @ of_columns) / math.sqrt(len(of_columns) * high)
        by_column = (matrix.T @ of_rows) / math.sqrt(rows * high)
        return torch.cat([by_row, by_column])
    return torch.cat([view.sum(-1) for view in group_views(x, grid)], dim=1)


RULE = Learned
