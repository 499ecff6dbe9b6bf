"""seen = w + uniform noise of +- scale/2, dL/dw = dL/dseen (Quant-Noise, arXiv 2004.07320)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import group_views, join_groups, scales_of, split_scales


class Noise(GradientRule):
    is_on_grid = False
    draws = True

    def see(
        self, w: Tensor, grid: Grid, *, generator: torch.Generator | None = None, **_: Any
    ) -> Seen:
        noise = torch.rand(w.shape, generator=generator, device=w.device) - 0.5
        views = group_views(w, grid)
        cut = split_scales(scales_of(w, grid), views)
        parts = zip(views, cut, group_views(noise, grid), strict=True)
        return Seen(join_groups([view + scale * part for view, scale, part in parts], w.shape))


RULE = Noise
