"""Rounding: the only place where weights meet their grid.

``encode`` turns weights into codes, steps and zero points, ``decode`` turns them back, and ``snap``
is decode of encode: literally, so that the weight a model trains with is the weight its artifact
stores, bit for bit.

A step that is zero after rounding (an all-zero row, or one too small for fp16) gives zero codes and
zero weights. What is not finite is an error of ``check_finite``, which names the tensor; the hot
path does not look, since looking would stall a GPU. Division by the step, not multiplication by its
reciprocal: the two differ in the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.grid import DTYPES, FP8, Grid
from qat.quantize.quantile import row_quantile

MSE_SHARES = tuple(1.0 - 0.04 * k for k in range(16))  # of max|w|, tried by the mse rule


class Codes(NamedTuple):
    """int8 codes of the weight's shape; steps and zero points (rows, groups)."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None = None


def group_views(w: Tensor, grid: Grid) -> list[Tensor]:
    """``w`` as (rows, groups, columns) views: whole groups, and the shorter last one if any."""
    rows = w.reshape(1, -1) if grid.per_tensor or w.dim() < 2 else w.flatten(1)
    size = grid.group_size or rows.size(1)
    whole = rows.size(1) // size * size
    views = [rows[:, :whole].unflatten(1, (-1, size))] if whole else []
    return views + ([rows[:, None, whole:]] if whole < rows.size(1) else [])


def join_groups(views: list[Tensor], shape: torch.Size) -> Tensor:
    """The inverse of ``group_views``."""
    flat = [view.flatten(1) for view in views]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).view(shape)


def split_steps(steps: Tensor, views: list[Tensor]) -> list[Tensor]:
    """(rows, groups) per view, ready to broadcast: (rows, groups of the view, 1)."""
    return [s[..., None] for s in steps.split([view.size(1) for view in views], dim=1)]


def round_to_codes(x: Tensor, grid: Grid) -> Tensor:
    """Weights in units of their step -> codes as float32 numbers."""
    low, high = grid.code_limits
    if grid.levels in FP8:
        return x.clamp(low, high).to(FP8[grid.levels]).float()
    if grid.levels == "binary":
        return torch.where(x < 0, -1.0, 1.0)
    return x.round().clamp_(low, high)


def in_step_units(view: Tensor, step: Tensor) -> Tensor:
    """w / step, and 0 where the step is 0."""
    return view / torch.where(step > 0, step, torch.inf)


def _clip_to_step(clip: Tensor, grid: Grid) -> Tensor:
    low, high = grid.code_limits
    return (clip / ((high - low) / 2)).clamp_min(grid.step_floor)


def _clip(view: Tensor, grid: Grid) -> Tensor:
    """Largest magnitude to represent; (rows, groups, n) -> (rows, groups)."""
    if grid.step_rule == "percentile":
        return row_quantile(view.abs(), grid.percentile)
    if grid.step_rule == "sigma":
        return grid.sigma * view.std(-1, correction=0)
    amax = view.abs().amax(-1)
    if grid.step_rule in ("mse", "learned"):
        return _least_square_clip(view, amax, grid)
    return amax


def _least_square_clip(view: Tensor, amax: Tensor, grid: Grid) -> Tensor:
    best_clip, least = amax, torch.full_like(amax, torch.inf)
    for share in MSE_SHARES:
        clip = amax * share
        step = _clip_to_step(clip, grid).to(DTYPES[grid.step_dtype]).float()[..., None]
        error = (
            round_to_codes(in_step_units(view, step), grid).mul_(step).sub_(view).square_().sum(-1)
        )
        best_clip = torch.where(error < least, clip, best_clip)
        least = torch.minimum(error, least)
    return best_clip


class _Scale(NamedTuple):
    """Of one view, each (rows, groups): step before rounding, zero points, clip if it must bind."""

    step: Tensor
    zero: Tensor | None = None
    clip: Tensor | None = None


def _find_scale(view: Tensor, grid: Grid) -> _Scale:
    if grid.step_rule == "fixed":
        return _Scale(torch.full_like(view[..., 0], grid.fixed_step or 0.0))
    if grid.step_rule == "absmean" or grid.levels == "binary":
        return _Scale(view.abs().mean(-1).clamp_min(grid.step_floor))
    if grid.range == "asymmetric":
        low, high = grid.code_limits
        lowest, highest = view.amin(-1).clamp_max(0.0), view.amax(-1).clamp_min(0.0)
        step = ((highest - lowest) / (high - low)).clamp_min(grid.step_floor)
        rounded = step.to(DTYPES[grid.step_dtype]).float()
        return _Scale(step, (low - in_step_units(lowest, rounded)).round().clamp(low, high))
    clip = _clip(view, grid)
    # Where a floor binds, codes do not reach their limits, and the clip has to do the clipping.
    binds = grid.step_floor > 0.0 and grid.step_rule in ("percentile", "sigma")
    return _Scale(_clip_to_step(clip, grid), clip=clip if binds else None)


def _encode_view(view: Tensor, grid: Grid, scale: _Scale) -> tuple[Tensor, Tensor]:
    """(codes as float32 numbers, steps in their storage dtype) of one view."""
    kept = scale.step.to(DTYPES[grid.step_dtype])
    code_step = kept.float()
    if grid.code_step_dtype is not None:
        code_step = scale.step.to(DTYPES[grid.code_step_dtype]).float()
    if scale.clip is not None:
        view = view.clamp(-scale.clip[..., None], scale.clip[..., None])
    x = in_step_units(view, code_step[..., None])
    if scale.zero is not None:
        return x.round().add_(scale.zero[..., None]).clamp_(*grid.code_limits), kept
    code = round_to_codes(x, grid)
    if grid.levels == "binary":
        code = code * (code_step > 0)[..., None]
    if grid.refit:
        mean = code.abs().mean(-1)
        kept = torch.where(mean > 0, code_step / mean, code_step).to(kept.dtype)
    return code, kept


def encode(w: Tensor, grid: Grid, steps: Tensor | None = None) -> Codes:
    """Float32 weights -> codes and steps (and zero points).

    ``steps`` (rows, groups) are learned ones; without them the grid's own rule finds them.
    """
    views = group_views(w, grid)
    if steps is None:
        scales = [_find_scale(view, grid) for view in views]
    else:
        given = split_steps(steps, views)
        scales = [_Scale(step[..., 0].clamp_min(grid.step_floor)) for step in given]
    encoded = [_encode_view(v, grid, scale) for v, scale in zip(views, scales, strict=True)]
    codes = join_groups([code for code, _ in encoded], w.shape)
    zeros = [scale.zero.to(torch.int8) for scale in scales if scale.zero is not None]
    return Codes(
        codes.to(FP8[grid.levels]).view(torch.int8) if grid.levels in FP8 else codes.to(torch.int8),
        torch.cat([kept for _, kept in encoded], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
    )


def decode(coded: Codes, grid: Grid) -> Tensor:
    """Codes, steps and zero points -> float32 weights of the codes' shape."""
    codes = coded.codes.view(FP8[grid.levels]) if grid.levels in FP8 else coded.codes
    views = group_views(codes.float(), grid)
    if coded.zeros is not None:
        zeros = split_steps(coded.zeros.float(), views)
        views = [view - zero for view, zero in zip(views, zeros, strict=True)]
    steps = split_steps(coded.steps.float(), views)
    weights = join_groups([v.mul_(s) for v, s in zip(views, steps, strict=True)], codes.shape)
    return weights.add_(0.0)  # -0 becomes +0, so that equal weights are equal bits


def snap(w: Tensor, grid: Grid, steps: Tensor | None = None) -> Tensor:
    """The weight that an artifact on this grid would give back for ``w``."""
    return decode(encode(w, grid, steps), grid)


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
