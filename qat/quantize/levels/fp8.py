"""The 8-bit floats of the Open Compute Project (arXiv 2209.05433), rounded to even as torch does.

A code is the format's own byte, so zero has a sign, and some bytes of a damaged file are no number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quantize.levels import Levels

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Float8(Levels):
    bits = 8.0
    codes = -128, 127
    zero_has_sign = True

    def __init__(self, name: str, torch_name: str, largest: float) -> None:
        self.name, self.torch_name = name, torch_name
        self.limits = -largest, largest

    @property
    def dtype(self) -> dtype:
        import torch

        return getattr(torch, self.torch_name)

    def nearest(self, x: Tensor) -> Tensor:
        return x.clamp(*self.limits).to(self.dtype).float()

    def to_codes(self, levels: Tensor) -> Tensor:
        import torch

        return levels.to(self.dtype).view(torch.int8)

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(self.dtype).float()


LEVELS = (
    Float8("fp8_e4m3", "float8_e4m3fn", 448.0),
    Float8("fp8_e5m2", "float8_e5m2", 57344.0),
)
