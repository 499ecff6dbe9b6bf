"""Straight-through: seen = snap(w), dL/dw = dL/dseen (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat.quantize.gradients import GradientRule, Seen
from qat.quantize.grid import Grid
from qat.quantize.rounding import snap


class Identity(GradientRule):
    snaps_only = True

    def supports(self, grid: Grid) -> bool:
        return True

    def see(self, w: Tensor, grid: Grid, **_: Any) -> Seen:
        return Seen(snap(w, grid))


RULE = Identity
