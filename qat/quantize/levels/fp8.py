"""The 8-bit floats of the Open Compute Project (arXiv 2209.05433), rounded to even as torch does.

A code is the format's own byte, so zero has a sign, and some bytes of a damaged file are no number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import Levels, nearest_of_format

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Float8(Levels):
    fuses = True
    bits = 8.0
    codes = -128, 127
    zero_has_sign = True

    def __init__(self, name: str, largest: float, mantissa_bits: int, least_normal: float) -> None:
        self.name = name
        self.torch_name = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[name]
        self.limits = -largest, largest
        self.mantissa_bits, self.least_normal = mantissa_bits, least_normal

    @property
    def dtype(self) -> dtype:
        import torch

        return getattr(torch, self.torch_name)

    def nearest(self, x: Tensor) -> Tensor:
        import torch

        x = x.clamp(*self.limits)
        if not torch.compiler.is_compiling():
            return x.to(self.dtype).float()
        return nearest_of_format(x, self.mantissa_bits, self.least_normal)

    def to_codes(self, levels: Tensor) -> Tensor:
        import torch

        return levels.to(self.dtype).view(torch.int8)

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(self.dtype).float()


LEVELS = (
    Float8("fp8_e4m3", 448.0, 3, 2.0**-6),
    Float8("fp8_e5m2", 57344.0, 2, 2.0**-14),
)
