"""Floats of four and six bits (OCP Microscaling Formats v1.0): e2m1, e2m3 and e3m2.

A weight goes to the nearest, of two to the one whose last bit is 0, as the specification says. A
code counts the levels from 0, so small magnitudes are common ones; -0 is stored as 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qat.quantize.levels import CLIP_RULES, ListedLevels

if TYPE_CHECKING:
    from torch import Tensor


ROUNDS_TO_WHOLE = 1.5 * 2.0**23


class Minifloat(ListedLevels):
    fuses = True

    def __init__(self, name: str, exponent_bits: int, mantissa_bits: int) -> None:
        lowest = 2 - 2 ** (exponent_bits - 1)  # exponent of normal numbers; no code is set aside
        highest = 2 ** (exponent_bits - 1)
        # Exponents from the lowest up, and how far apart numbers are from there on.
        self.gaps = [(2.0**e, 2.0 ** (e - mantissa_bits)) for e in range(lowest, highest + 1)]
        gap = self.gaps[0][1]
        magnitudes = [gap * k for k in range(2**mantissa_bits)]  # subnormal
        for start, gap in self.gaps:
            magnitudes += [start + gap * k for k in range(2**mantissa_bits)]
        values = (*(-m for m in magnitudes[:0:-1]), *magnitudes)
        super().__init__(name, values, (*CLIP_RULES, "power", "fixed", "given"))
        self.margin = self.gaps[-1][1] / 2
        self.bits = float(math.ceil(self.bits))  # files of this format have a place for -0

    def nearest(self, x: Tensor) -> Tensor:
        import torch

        magnitude = x.abs()
        # What a float32 of this size can add to the multiples of a gap alone: adding it rounds x to
        # them, half to even, and taking it away again is exact. Division is what takes time else.
        rounder = torch.full_like(x, self.gaps[0][1] * ROUNDS_TO_WHOLE)
        for start, gap in self.gaps[1:]:
            rounder = torch.where(magnitude >= start, gap * ROUNDS_TO_WHOLE, rounder)
        return ((x + rounder) - rounder).clamp(*self.limits)


LEVELS = (Minifloat("e2m1", 2, 1), Minifloat("e2m3", 2, 3), Minifloat("e3m2", 3, 2))
