"""THE grid: the only place where weights are rounded.

A grid says which values a weight may take. ``encode`` turns weights into integer codes and steps,
``decode`` turns them back, and ``snap`` is decode of encode: literally, so that the weight a model
trains with is the weight its artifact stores, bit for bit. Training, post-training and export all
call these functions and nothing else rounds.

Symmetric integer grids, ``code`` in [-qmax, qmax] with qmax = 2^(bits-1) - 1, one step per row or
per group of ``group_size`` columns (the last group of a row may be shorter):

    clip = amax: max|w|            percentile: linear-interpolated quantile of |w|
    step = max(clip / qmax, step_floor), rounded to its storage dtype *before* codes are computed
    code = round_half_even(w / step), clamped;   weight = code * step, in float32

A step that is zero after rounding (an all-zero row, or one too small for fp16) gives zero codes and
zero weights. Steps that overflow their dtype and weights that are not finite are errors of
``check_finite``, which names the tensor; the hot path does not look, since looking would stall a
GPU.

Division by the step, not multiplication by its reciprocal: the two differ in the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP_RULES = ("amax", "percentile")
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """One grid. ``group_size`` None: one step per row; ``percentile``: a fraction in (0, 1]."""

    bits: int
    group_size: int | None = None
    step_rule: str = "amax"
    percentile: float = 0.9999984
    step_floor: float = 0.0
    step_dtype: str = "fp16"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits = {self.bits}: give {MIN_BITS} to {MAX_BITS}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size = {self.group_size}: give 1 or more, or null for per row")
        if self.step_rule not in STEP_RULES:
            raise ValueError(f"step_rule = {self.step_rule}: choose from {', '.join(STEP_RULES)}")
        if not 0.0 < self.percentile <= 1.0:
            raise ValueError(f"percentile = {self.percentile}: give a fraction in (0, 1]")
        if not 0.0 <= self.step_floor < math.inf:
            raise ValueError(f"step_floor = {self.step_floor}: give 0 or more")
        if self.step_dtype not in DTYPES:
            raise ValueError(f"step_dtype = {self.step_dtype}: choose from {', '.join(DTYPES)}")

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def label(self) -> str:
        """Short name that says every field that differs from a plain per-row amax grid."""
        parts = [f"int{self.bits}"]
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.step_rule == "percentile":
            parts.append(f"p{self.percentile:g}")
        if self.step_floor:
            parts.append(f"floor{self.step_floor:g}")
        if self.step_dtype != "fp16":
            parts.append(self.step_dtype)
        return "_".join(parts)

    def num_groups(self, columns: int) -> int:
        return 1 if self.group_size is None else math.ceil(columns / self.group_size)


def as_rows(w: Tensor) -> Tensor:
    """Any tensor as (rows, columns): a vector is one row, trailing dimensions are flattened."""
    return w.reshape(1, -1) if w.dim() < 2 else w.flatten(1)


def row_quantile(magnitude: Tensor, q: float) -> Tensor:
    """``torch.quantile(magnitude, q, dim=-1)``, bit for bit; (..., n) -> (...), n up to 2^24.

    The interpolated quantile of a row shorter than 1 / (1 - q) lies between its two largest
    entries, so no sort is needed; longer rows are sorted.
    """
    n = magnitude.size(-1)
    rank = torch.tensor(q, dtype=torch.float32) * (n - 1)
    below = int(rank.floor())
    if n == 1 or below == n - 1:
        return magnitude.amax(-1)
    if below < n - 2:
        return torch.quantile(magnitude, q, dim=-1)
    first, second = magnitude.topk(2, dim=-1).values.unbind(-1)
    return torch.lerp(second, first, float(rank - below))


def _clip(group: Tensor, grid: Grid) -> Tensor:
    """Largest magnitude to represent; (..., n) -> (...)."""
    magnitude = group.abs()
    if grid.step_rule == "percentile":
        return row_quantile(magnitude, grid.percentile)
    return magnitude.amax(-1)


def find_steps(w: Tensor, grid: Grid) -> Tensor:
    """Steps in their storage dtype, shape (rows, groups); ``w`` is float32 of any shape."""
    rows = as_rows(w)
    size = grid.group_size or rows.size(1)
    whole = rows.size(1) // size * size
    clips = []
    if whole:
        clips.append(_clip(rows[:, :whole].unflatten(1, (-1, size)), grid))
    if whole < rows.size(1):
        clips.append(_clip(rows[:, None, whole:], grid))
    clip = torch.cat(clips, dim=1)
    return (clip / grid.qmax).clamp_min(grid.step_floor).to(DTYPES[grid.step_dtype])


def _per_column(steps: Tensor, grid: Grid, columns: int) -> Tensor:
    """(rows, groups) steps as float32, broadcastable to (rows, columns)."""
    steps = steps.float()
    if grid.group_size is None:
        return steps
    return steps.repeat_interleave(grid.group_size, dim=1)[:, :columns]


def encode(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Float32 weights -> (int8 codes of the same shape, steps (rows, groups) in their dtype)."""
    steps = find_steps(w, grid)
    rows = as_rows(w)
    divisor = _per_column(steps, grid, rows.size(1))
    divisor = torch.where(divisor > 0, divisor, torch.inf)
    codes = (rows / divisor).round_().clamp_(-grid.qmax, grid.qmax)
    return codes.to(torch.int8).view(w.shape), steps


def decode(codes: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """Codes and steps -> float32 weights of the codes' shape."""
    rows = as_rows(codes)
    return (rows.float() * _per_column(steps, grid, rows.size(1))).view(codes.shape)


def snap(w: Tensor, grid: Grid) -> Tensor:
    """The weight that an artifact on this grid would give back for ``w``."""
    return decode(*encode(w, grid), grid)


def check_finite(name: str, w: Tensor, steps: Tensor) -> None:
    """Raise ValueError naming the tensor (and row) if its weights or steps are not finite."""
    if not torch.isfinite(w).all():
        raise ValueError(f"tensor {name} holds NaN or infinity")
    bad_rows = (~torch.isfinite(steps)).any(dim=1).nonzero().flatten()
    if len(bad_rows):
        dtype = str(steps.dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor {name}, row {int(bad_rows[0])}: its step overflows {dtype}; "
            "use a wider step_dtype"
        )
