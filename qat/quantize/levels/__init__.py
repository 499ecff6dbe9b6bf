"""Number formats: the levels that a weight may take, in units of its scale.

A format is a file of this folder that says ``LEVELS``, a tuple of ``Levels``. Files are found by
looking, and the names of their levels are the values of ``grid.levels``: docs/add_a_format.md.

No file here imports torch outside its functions: settings and ``--help`` ask for names and limits.
Functions take and give tensors of any shape, element by element, on any device.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from importlib import import_module
from itertools import pairwise
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CLIP_RULES = ("amax", "percentile", "sigma", "mse")  # find a clip: the place of the highest level
SCALE_RULES = (*CLIP_RULES, "power", "fixed", "absmean", "learned", "given")
INTEGER_RULES = tuple(rule for rule in SCALE_RULES if rule != "power")
CHUNK = 1 << 22  # codes looked up at once: an index takes four bytes


class Levels:
    """One format. Here is what holds for levels that are small integers, stored as they are."""

    name: str
    limits: tuple[float, float]  # the lowest and the highest level
    codes: tuple[int, int]  # the lowest and the highest of the bytes that stand for them
    bits: float  # of a code, packed as tightly as the number of levels allows
    scale_rules: tuple[str, ...] = tuple(rule for rule in SCALE_RULES if rule != "learned")
    takes: tuple[str, ...] = ()  # of Grid's fields ``refit`` and ``column_scales``
    # Whole numbers, rounded to even: relaxed gradients and the Triton kernels, which round without
    # asking ``nearest``, need that.
    is_even = False
    margin: float | None = None  # how far beyond a limit a weight may be that is not clamped
    fuses = False  # a compiler gives ``nearest`` the same bits: no detour through another dtype
    has_zero = True  # without: where a scale is 0, the code is 0 all the same
    zero_has_sign = False  # a code is a sign bit and a magnitude of seven
    # Of formats that are defined by another program's code:
    multiplies = False  # weights are multiplied by the reciprocal of a scale that is not rounded
    has_minimum = False  # levels count from a group's least weight, stored beside its scale
    scale_has_sign = False  # the weight of largest magnitude gets the lowest level
    keeps_negative_zero = False

    @property
    def label(self) -> str:
        return self.name

    def of(self, bits: int | None, range: str) -> Levels:
        """The levels for these fields of a grid. ValueError naming the field that has no place."""
        if bits is not None:
            raise ValueError(f"bits = {bits}: {self.name} has its own levels")
        if range != "symmetric":
            raise ValueError(f"range = {range}: {self.name} levels are symmetric")
        return self

    def nearest(self, x: Tensor) -> Tensor:
        """Weights in units of their scale -> levels, a new tensor. Both float32."""
        raise NotImplementedError

    def to_codes(self, levels: Tensor) -> Tensor:
        """Levels, float32 -> int8."""
        return levels.char()

    def from_codes(self, codes: Tensor) -> Tensor:
        """Contiguous int8 -> levels, a new float32 tensor."""
        return codes.float()


def nearest_of_mantissa(x: Tensor, bits: int) -> Tensor:
    """The nearest float32 number with so many bits of mantissa, of two the even one. By arithmetic,
    because a compiler may drop a detour through another dtype."""
    import torch

    dropped, number = 23 - bits, x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    kept = (number + half + ((number >> dropped) & 1)) & -(1 << dropped)
    return kept.view(torch.float32)


def nearest_of_format(x: Tensor, mantissa_bits: int, least_normal: float) -> Tensor:
    """As ``nearest_of_mantissa``, of a format whose numbers below ``least_normal`` are multiples of
    one gap."""
    import torch

    gap = least_normal / 2**mantissa_bits
    small = (x / gap).round() * gap  # a power of two: exact
    return torch.where(x.abs() < least_normal, small, nearest_of_mantissa(x, mantissa_bits))


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


class ListedLevels(Levels):
    """Any ascending values, stored by their place, counted from that of 0; a tie goes down."""

    fuses = True

    def __init__(self, name: str, values: tuple[float, ...], scale_rules: tuple[str, ...]) -> None:
        self.name, self.scale_rules = name, scale_rules
        self.values = values = tuple(map(_float32, values))
        self.limits = values[0], values[-1]
        self.codes = -values.index(0.0), len(values) - 1 - values.index(0.0)
        self.bits = math.log2(len(values))
        self.between = [_float32((low + high) / 2) for low, high in pairwise(values)]

    def nearest(self, x: Tensor) -> Tensor:
        import torch

        if not torch.compiler.is_compiling():
            return self.from_codes(self.to_codes(x))
        # Comparisons become part of a compiler's loop over weights; looking up a table does not.
        level = torch.full_like(x, self.values[0])
        for value, edge in zip(self.values[1:], self.between, strict=True):
            level = torch.where(x > edge, value, level)
        return level

    def to_codes(self, levels: Tensor) -> Tensor:
        import torch

        between = torch.tensor(self.between, device=levels.device)
        places = torch.bucketize(levels.contiguous(), between, out_int32=True)
        return places.add_(self.codes[0]).char()

    def from_codes(self, codes: Tensor) -> Tensor:
        import torch

        values = torch.tensor(self.values, device=codes.device)
        found = torch.empty(codes.shape, device=codes.device)
        parts = (t.view(-1).split(CHUNK) for t in (codes, found))
        for part, into in zip(*parts, strict=True):
            torch.index_select(values, 0, part.int().sub_(self.codes[0]), out=into)
        return found


@cache
def all_levels() -> dict[str, Levels]:
    """Every format of this folder by its name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return {levels.name: levels for module in modules for levels in module.LEVELS}
