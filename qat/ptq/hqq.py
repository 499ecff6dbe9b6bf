"""HQQ: the zero point of each group that leaves errors few and large rather than many, no data.

    weight = (code - zero) * scale,   code = round(w / scale + zero),   scale = (max - min) / levels

The zero point is a real number, found by half-quadratic splitting of sum |error|^p, p = 0.7: errors
e that the norm would keep are split off by shrinkage, then the zero point is the mean of
code - (w - e) / step, and the weight of the split grows. A step ahead is taken while it helps.
Grids of this project have whole zero points, which such a search never moves (measured at 3 and 4
bits), so codes come with zero points of their own.

Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.rounding import group_views, in_scale_units, join_groups, round_to_levels

NORM = 0.7  # p
FIRST_BETA, BETA_GROWTH = 10.0, 1.01
MAX_ROUNDS = 20
LARGEST_ZERO = 2.0**14
TINY = torch.finfo(torch.float16).tiny


class RealZeros(NamedTuple):
    """Codes (rows, columns) int8, fp16 scales and zero points (rows, groups), decoded weights."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    weights: Tensor


@torch.no_grad()
def hqq(w: Tensor, bits: int, group_size: int) -> RealZeros:
    """Float32 weights (rows, columns) -> their codes in groups of ``group_size`` columns."""
    grid = Grid(bits=bits, range="full", group_size=group_size)
    found = [_solve(view, grid) for view in group_views(w, grid)]
    codes, weights = (join_groups([part[k] for part in found], w.shape) for k in (0, 3))
    scales, zeros = (torch.cat([part[k] for part in found], dim=1) for k in (1, 2))
    return RealZeros(codes.to(torch.int8), scales.half(), zeros.half(), weights)


def _solve(view: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros, weights of groups (rows, groups, columns)."""
    lowest, highest = view.amin(-1), view.amax(-1)
    low_code, high_code = grid.table.limits
    scale = in_scale_units(highest - lowest, torch.full_like(lowest, high_code - low_code))
    # A group of nearly equal weights has a zero point far off: it has to fit fp16 too.
    smallest = torch.maximum(view.abs().amax(-1) / LARGEST_ZERO, torch.full_like(scale, TINY))
    scale = torch.maximum(scale, smallest).half().float()
    zero = low_code - in_scale_units(lowest, scale)
    beta = FIRST_BETA
    best: tuple[Tensor, ...] | None = None
    least = torch.full_like(lowest, torch.inf)
    for _ in range(MAX_ROUNDS):
        kept_zero = zero.half().float()
        scaled = in_scale_units(view, scale[..., None])
        code = round_to_levels(scaled + kept_zero[..., None], grid)
        weight = (code - kept_zero[..., None]) * scale[..., None]
        error = view - weight
        norm = error.abs().pow(NORM).sum(-1)
        found: tuple[Tensor, ...] = (code, scale, kept_zero, weight)
        is_less = norm < least
        best = found if best is None else tuple(
            torch.where(is_less[..., None] if new.dim() == 3 else is_less, new, old)
            for new, old in zip(found, best, strict=True)
        )  # fmt: skip
        if not bool(is_less.any()):
            break
        least = torch.minimum(norm, least)
        size = error.abs()
        shrunk = error.sign() * (size - size.pow(NORM - 1) / beta).clamp_min(0.0)
        shrunk = torch.where(size > 0, shrunk, 0.0)
        zero = (code - in_scale_units(view - shrunk, scale[..., None])).mean(-1)
        beta *= BETA_GROWTH
    assert best is not None
    code, scales, zeros, weight = best
    return code, scales, zeros, weight
