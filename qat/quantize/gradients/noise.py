"""seen = w + uniform noise of +- scale/2, dL/dw = dL/dseen (Quant-Noise, arXiv 2004.07320).

The noise has 256 values: a finer one takes several times as long to draw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid


def disturb(view: Tensor, scale: Tensor, drawn: Tensor, **_: Any) -> tuple[Tensor]:
    return (view + scale * ((drawn.float() + 0.5) / 256),)


class Noise(GradientRule):
    is_on_grid = False
    draws = True

    def see(
        self, w: Tensor, grid: Grid, *, generator: torch.Generator | None = None, **_: Any
    ) -> Seen:
        drawn = torch.empty(-(-w.numel() // 8), dtype=torch.int64, device=w.device)
        drawn.random_(-(2**63), None, generator=generator)
        of_each = drawn.view(torch.int8)[: w.numel()].view(w.shape)
        return Seen(*self.by_group(disturb, w, grid, of_each))


RULE = Noise
