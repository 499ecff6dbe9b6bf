"""Two bits without a zero: -1.5, -0.5, 0.5, 1.5 (ParetoQ's stretched elastic levels, 2502.02631).

All four codes are used and levels are balanced around 0; "elastic" is the learned scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import CLIP_RULES, Levels

if TYPE_CHECKING:
    from torch import Tensor


class Int2Seq(Levels):
    name = "int2_seq"
    limits = -1.5, 1.5
    codes = -2, 1
    bits = 2.0
    scale_rules = (*CLIP_RULES, "fixed", "given", "learned")
    has_zero = False
    margin = 0.5
    fuses = True

    def nearest(self, x: Tensor) -> Tensor:
        return x.floor().clamp(-2.0, 1.0).add(0.5)

    def to_codes(self, levels: Tensor) -> Tensor:
        return levels.floor().char()

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes.float().add_(0.5)


LEVELS = (Int2Seq(),)
