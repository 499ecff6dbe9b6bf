"""seen = w + uniform noise of +- scale/2, dL/dw = dL/dseen (Quant-Noise, arXiv 2004.07320)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid


def disturb(view: Tensor, scale: Tensor, noise: Tensor, **_: Any) -> tuple[Tensor]:
    return (view + scale * (noise - 0.5),)


class Noise(GradientRule):
    is_on_grid = False
    draws = True

    def see(
        self, w: Tensor, grid: Grid, *, generator: torch.Generator | None = None, **_: Any
    ) -> Seen:
        noise = torch.rand(w.shape, generator=generator, device=w.device)
        return Seen(*self.by_group(disturb, w, grid, noise))


RULE = Noise
