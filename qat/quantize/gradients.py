"""Gradient rules: what the model sees of a master weight, and how gradients get back to it.

A rule is a function of (w, grid) and gives the weight seen and factors for the backward pass; none
of it runs inside the model's graph.

    identity    seen = snap(w), dL/dw = dL/dseen (straight-through, arXiv 1308.3432)
    clipped     the same, but zero where the code was clamped (PACT-like, arXiv 1805.06085)
    soft_round  seen = soft rounding of w/step, dL/dw scaled by its slope; ``temperature`` anneals
                from 1 (nearly linear) to ``COLDEST`` (nearly rounding) (arXiv 2006.09952)
    noise       seen = w + uniform noise of +- step/2, dL/dw = dL/dseen (arXiv 2004.07320)

Learned steps (LSQ, arXiv 1902.08153) are clipped, and give their step the gradient
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
    in_step_units,
    join_groups,
    products_in_step_units,
    round_to_codes,
    snap,
    split_steps,
)

RULES = ("identity", "clipped", "soft_round", "noise")
COLDEST = 0.05


class Seen(NamedTuple):
    """The weight seen, d seen / d master (None: 1), d seen / d step per weight (None: no step)."""

    weight: Tensor
    slope: Tensor | None = None
    step_slope: Tensor | None = None


def supports(rule: str, grid: Grid) -> bool:
    """The relaxations need evenly spaced levels and one step for coding and decoding."""
    even = grid.levels in ("int", "ternary") and grid.range != "asymmetric"
    plain = grid.code_step_dtype is None and not grid.refit
    return rule == "identity" or (even and plain)


def temperature(progress: float) -> float:
    """1 at the switch, falling geometrically to ``COLDEST`` at the end."""
    return COLDEST ** min(max(progress, 0.0), 1.0)


def see(
    w: Tensor,
    grid: Grid,
    rule: str,
    steps: Tensor | None = None,
    progress: float = 0.0,
    generator: torch.Generator | None = None,
) -> Seen:
    """Apply a rule. ``progress`` runs from 0 at the switch to 1; ``generator`` feeds the noise."""
    if steps is not None:
        return _learned(w, grid, steps)
    if rule == "identity":
        return Seen(snap(w, grid))
    found = encode(w, grid).steps
    if rule == "noise":
        noise = torch.rand(w.shape, generator=generator, device=w.device) - 0.5
        views = zip(group_views(w, grid), group_views(noise, grid), strict=True)
        cut = split_steps(found, group_views(w, grid))
        seen = [view + step * part for (view, part), step in zip(views, cut, strict=True)]
        return Seen(join_groups(seen, w.shape))
    seen, slopes = [], []
    low, high = grid.code_limits
    views_w = group_views(w, grid)
    for view, step in zip(views_w, split_steps(found, views_w), strict=True):
        x = in_step_units(view, step)
        inside = (x >= low - 0.5) & (x <= high + 0.5)
        if rule == "clipped":
            seen.append(round_to_codes(x, grid) * step + 0.0)
            slopes.append(inside.float())
        else:
            soft, slope = _soft_round(x, temperature(progress))
            seen.append(soft.clamp(low, high) * step)
            slopes.append(slope * inside)
    return Seen(join_groups(seen, w.shape), join_groups(slopes, w.shape))


def _soft_round(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A smooth staircase through the half-integers, and its slope."""
    floor = x.floor()
    tanh = torch.tanh((x - floor - 0.5) / temperature)
    height = 2 * math.tanh(0.5 / temperature)
    return floor + 0.5 + tanh / height, (1 - tanh.square()) / (temperature * height)


def _learned(w: Tensor, grid: Grid, steps: Tensor) -> Seen:
    """``step_slope`` is d seen / d step; of products of steps in units of the product."""
    if grid.column_steps:
        return _learned_products(w, grid, steps)
    low, high = grid.code_limits
    coded = encode(w, grid, steps)
    seen, inside_views, slopes = [], [], []
    views = group_views(w, grid)
    for view, step in zip(views, split_steps(coded.steps, views), strict=True):
        x = in_step_units(view, step)
        code = round_to_codes(x, grid)
        inside = (x > low) & (x < high)
        seen.append(code * step + 0.0)
        inside_views.append(inside.float())
        slopes.append((code - x * inside) / math.sqrt(view.size(-1) * high))
    return Seen(
        join_groups(seen, w.shape), join_groups(inside_views, w.shape), join_groups(slopes, w.shape)
    )


def _learned_products(w: Tensor, grid: Grid, steps: Tensor) -> Seen:
    stored = steps.to(DTYPES[grid.step_dtype])
    x = products_in_step_units(w, stored)
    codes = round_to_codes(x, grid)
    inside = x.abs() < grid.code_limits[1]
    slope = codes - x * inside
    seen = decode(Codes(as_stored(codes, grid).view_as(w), stored), grid)
    return Seen(seen, inside.float().view_as(w), slope.view_as(w))


def sum_per_step(x: Tensor, grid: Grid, steps: Tensor) -> Tensor:
    """Sum over the weights that share a step; weight's shape -> (rows, groups) as ``steps``.

    Of products ``x`` is in units of the product: a row's sum goes over its columns' steps, and the
    other way, each over the root of the weights times the highest code (LSQ).
    """
    if grid.column_steps:
        rows = x.size(0) if x.dim() > 1 else 1
        of_rows, of_columns = steps[:rows], steps[rows:]
        matrix, high = x.reshape(rows, -1), grid.code_limits[1]
        by_row = (matrix @ of_columns) / math.sqrt(len(of_columns) * high)
        by_column = (matrix.T @ of_rows) / math.sqrt(rows * high)
        return torch.cat([by_row, by_column])
    return torch.cat([view.sum(-1) for view in group_views(x, grid)], dim=1)
