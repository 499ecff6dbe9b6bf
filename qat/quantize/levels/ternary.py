"""-1, 0 and 1 (BitNet b1.58, arXiv 2402.17764)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qat.quantize.levels import INTEGER_RULES, Levels

if TYPE_CHECKING:
    from torch import Tensor


class Ternary(Levels):
    name = "ternary"
    limits = codes = -1, 1
    bits = math.log2(3)
    scale_rules = INTEGER_RULES
    takes = ("refit",)
    is_even = fuses = True
    margin = 0.5

    def nearest(self, x: Tensor) -> Tensor:
        return x.round().clamp_(-1, 1)


LEVELS = (Ternary(),)
