"""The blocks of llama.cpp whose quantizer is a formula: q4_0, q4_1, q5_0, q5_1 and q8_0.

A block is a group of 32 weights. What makes them grids of their own is how a code is found: the
weight is multiplied by the reciprocal of the scale before that is rounded to fp16, and rounded half
up (half away from 0 in q8_0). q4_0 and q5_0 give the weight of largest magnitude the lowest level,
so a scale has a sign. q4_1 and q5_1 count from the block's minimum, which is stored in fp16 too.
The bits are those of the ``gguf`` package, tested against it.

q4_k and q6_k are not here: their quantizer searches, and what it finds depends on how a compiler
orders its sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import Levels

if TYPE_CHECKING:
    from torch import Tensor


class GgufLevels(Levels):
    multiplies = True
    keeps_negative_zero = True  # as llama.cpp decodes
    fuses = True

    def __init__(self, name: str, lowest: int, highest: int) -> None:
        self.name = name
        self.limits = self.codes = lowest, highest
        self.bits = float((highest - lowest).bit_length())
        self.has_minimum = lowest == 0
        self.scale_rules = ("amax",) if self.has_minimum else ("amax", "given")
        self.scale_has_sign = -lowest > highest

    def nearest(self, x: Tensor) -> Tensor:
        lowest, highest = self.limits
        return (x + (0.5 - lowest)).trunc().clamp(0, highest - lowest).add(lowest)


class GgufSymmetric(GgufLevels):
    def nearest(self, x: Tensor) -> Tensor:
        magnitude = x.abs()
        below = magnitude.floor()
        rounded = below + (2.0 * (magnitude - below)).floor()
        return rounded.clamp(max=self.limits[1]).copysign(x).add(0.0)  # a code has no -0


LEVELS = (
    GgufLevels("q4_0", -8, 7),
    GgufLevels("q4_1", 0, 15),
    GgufLevels("q5_0", -16, 15),
    GgufLevels("q5_1", 0, 31),
    GgufSymmetric("q8_0", -127, 127),
)
