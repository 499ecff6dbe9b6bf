"""Integers of 2 to 8 bits.

symmetric    -qmax ... qmax, qmax = 2^(bits-1) - 1
full         -qmax - 1 ... qmax, as torchao's symmetric mapping
asymmetric   the same codes; a level is a code less the group's zero point
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import INTEGER_RULES, Levels

if TYPE_CHECKING:
    from torch import Tensor

RANGES = ("symmetric", "full", "asymmetric")
MIN_BITS, MAX_BITS = 2, 8


class Int(Levels):
    name = "int"
    scale_rules = INTEGER_RULES
    takes = ("column_scales",)
    is_even = fuses = True
    margin = 0.5

    def __init__(self, bits: int = MAX_BITS, range: str = "symmetric") -> None:
        half = 2 ** (bits - 1)
        self.bits = float(bits)
        self.limits = self.codes = (1 - half if range == "symmetric" else -half), half - 1

    @property
    def label(self) -> str:
        return f"int{self.bits:.0f}"

    def of(self, bits: int | None, range: str) -> Levels:
        if range not in RANGES:
            raise ValueError(f"range = {range}: choose from {', '.join(RANGES)}")
        if bits is None or not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"bits = {bits}: give {MIN_BITS} to {MAX_BITS}")
        return Int(bits, range)

    def nearest(self, x: Tensor) -> Tensor:
        return x.round().clamp_(*self.limits)


LEVELS = (Int(),)
