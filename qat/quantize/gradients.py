"""Gradient rules: what the model sees of a master weight, and how gradients get back to it.

A rule is a function of (w, grid) and gives the weight seen and factors for the backward pass; none
of it runs inside the model's graph.

    identity    seen = snap(w), dL/dw = dL/dseen (straight-through, arXiv 1308.3432)
    clipped     the same, but zero where the code was clamped (PACT-like, arXiv 1805.06085)
    soft_round  seen = soft rounding of w/scale, dL/dw scaled by its slope; ``temperature`` anneals
                from 1 (nearly linear) to ``COLDEST`` (nearly rounding) (arXiv 2006.09952)
    noise       seen = w + uniform noise of +- scale/2, dL/dw = dL/dseen (arXiv 2004.07320)

Learned scales (LSQ, arXiv 1902.08153) are clipped, and give their scale the gradient
dL/dseen * (code - w/step inside, code at the clamps) / sqrt(N * highest code), N weights a step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.grid import DTYPES, Grid
from qat.quantize.rounding import (
    Codes,
    as_stored,
    decode,
    encode,
    group_views,
    in_scale_units,
    join_groups,
    products_in_scale_units,
    round_to_codes,
    snap,
    split_scales,
)

RULES = ("identity", "clipped", "soft_round", "noise")
COLDEST = 0.05


class Seen(NamedTuple):
    """The weight seen; d seen / d master (None: 1) and, per weight, d seen / d scale (or None)."""

    weight: Tensor
    slope: Tensor | None = None
    scale_slope: Tensor | None = None


def supports(rule: str, grid: Grid) -> bool:
    """The relaxations need evenly spaced levels and one scale for coding and decoding."""
    even = grid.levels in ("int", "ternary") and grid.range != "asymmetric"
    plain = grid.code_scale_dtype is None and not grid.refit
    return rule == "identity" or (even and plain)


def temperature(progress: float) -> float:
    """1 at the switch, falling geometrically to ``COLDEST`` at the end."""
    return COLDEST ** min(max(progress, 0.0), 1.0)


def see(
    w: Tensor,
    grid: Grid,
    rule: str,
    scales: Tensor | None = None,
    progress: float = 0.0,
    generator: torch.Generator | None = None,
) -> Seen:
    """Apply a rule. ``progress`` runs from 0 at the switch to 1; ``generator`` feeds the noise."""
    if scales is not None:
        return _learned(w, grid, scales)
    if rule == "identity":
        return Seen(snap(w, grid))
    found = encode(w, grid).scales
    if rule == "noise":
        noise = torch.rand(w.shape, generator=generator, device=w.device) - 0.5
        views = zip(group_views(w, grid), group_views(noise, grid), strict=True)
        cut = split_scales(found, group_views(w, grid))
        seen = [view + scale * part for (view, part), scale in zip(views, cut, strict=True)]
        return Seen(join_groups(seen, w.shape))
    seen, slopes = [], []
    low, high = grid.code_limits
    views_w = group_views(w, grid)
    for view, scale in zip(views_w, split_scales(found, views_w), strict=True):
        x = in_scale_units(view, scale)
        inside = (x >= low - 0.5) & (x <= high + 0.5)
        if rule == "clipped":
            seen.append(round_to_codes(x, grid) * scale + 0.0)
            slopes.append(inside.float())
        else:
            soft, slope = _soft_round(x, temperature(progress))
            seen.append(soft.clamp(low, high) * scale)
            slopes.append(slope * inside)
    return Seen(join_groups(seen, w.shape), join_groups(slopes, w.shape))


def _soft_round(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A smooth staircase through the half-integers, and its slope."""
    floor = x.floor()
    tanh = torch.tanh((x - floor - 0.5) / temperature)
    height = 2 * math.tanh(0.5 / temperature)
    return floor + 0.5 + tanh / height, (1 - tanh.square()) / (temperature * height)


def _learned(w: Tensor, grid: Grid, scales: Tensor) -> Seen:
    """``scale_slope`` is d seen / d scale; of products of scales in units of the product."""
    if grid.column_scales:
        return _learned_products(w, grid, scales)
    low, high = grid.code_limits
    coded = encode(w, grid, scales)
    seen, inside_views, slopes = [], [], []
    views = group_views(w, grid)
    for view, scale in zip(views, split_scales(coded.scales, views), strict=True):
        x = in_scale_units(view, scale)
        code = round_to_codes(x, grid)
        inside = (x > low) & (x < high)
        seen.append(code * scale + 0.0)
        inside_views.append(inside.float())
        slopes.append((code - x * inside) / math.sqrt(view.size(-1) * high))
    return Seen(
        join_groups(seen, w.shape), join_groups(inside_views, w.shape), join_groups(slopes, w.shape)
    )


def _learned_products(w: Tensor, grid: Grid, scales: Tensor) -> Seen:
    stored = scales.to(DTYPES[grid.scale_dtype])
    x = products_in_scale_units(w, stored)
    codes = round_to_codes(x, grid)
    inside = x.abs() < grid.code_limits[1]
    slope = codes - x * inside
    seen = decode(Codes(as_stored(codes, grid).view_as(w), stored), grid)
    return Seen(seen, inside.float().view_as(w), slope.view_as(w))


def sum_per_scale(x: Tensor, grid: Grid, scales: Tensor) -> Tensor:
    """Sum over the weights that share a scale; weight's shape -> (rows, groups) as ``scales``.

    Of products ``x`` is in units of the product: a row's sum goes over its columns' scales, and the
    other way, each over the root of the weights times the highest code (LSQ).
    """
    if grid.column_scales:
        rows = x.size(0) if x.dim() > 1 else 1
        of_rows, of_columns = scales[:rows], scales[rows:]
        matrix, high = x.reshape(rows, -1), grid.code_limits[1]
        by_row = (matrix @ of_columns) / math.sqrt(len(of_columns) * high)
        by_column = (matrix.T @ of_rows) / math.sqrt(rows * high)
        return torch.cat([by_row, by_column])
    return torch.cat([view.sum(-1) for view in group_views(x, grid)], dim=1)
