"""-1 and 1, the sign of a weight; 0 counts as positive (XNOR-Net's weights, arXiv 1603.05279)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import Levels

if TYPE_CHECKING:
    from torch import Tensor


class Binary(Levels):
    name = "binary"
    limits = codes = -1, 1
    bits = 1.0
    scale_rules = ("absmean", "fixed", "given")
    has_zero = False

    def nearest(self, x: Tensor) -> Tensor:
        return 1.0 - 2.0 * (x < 0)


LEVELS = (Binary(),)
