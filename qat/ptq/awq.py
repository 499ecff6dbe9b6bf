"""AWQ: columns that read large activations get finer scales, by a power of the activations' size.

    column scale = (mean|x| / its geometric mean) ^ -alpha

and row scales by the grid's own rule, of the weights divided by the rounded column scales.
``alpha`` is the one of ``ALPHAS`` with the least Tr(E H E^T). 0 is among them, rounding to nearest
with row scales alone, so the error is never above that.

The paper folds its scales into the layer before, where all matrices that read it share them; here
they are stored as ``column_scales``, exactly, at their dtype's bytes per column, and each matrix
has its own. So the grid has one scale per row.

Row scales by amax suit it best: mse clips just those columns that were scaled up to be kept exact,
and on random matrices (``benchmarks/gptq.py``) no power gained a thousandth. Left out: the paper's
search for a clip by output error.

Source: Lin et al., arXiv 2306.00978.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qat.ptq.gptq import row_output_errors
from qat.quantize.grid import Grid
from qat.quantize.rounding import DTYPES, Codes, decode, encode, in_scale_units

ALPHAS = tuple(k / 20 for k in range(21))


class Scaled(NamedTuple):
    """Codes, the grid with column scales that they are on, and the power that was best."""

    coded: Codes
    grid: Grid
    alpha: float


@torch.no_grad()
def awq(w: Tensor, hessian: Tensor, mean_magnitude: Tensor, grid: Grid) -> Scaled:
    """Float32 weights (rows, columns) -> the best scaled codes.

    ``hessian`` is (columns, columns), the mean of x x^T over tokens, ``mean_magnitude`` (columns,)
    the mean of |x|; ``grid`` is symmetric with one scale per row and finds row scales by its rule.
    ValueError for another grid.
    """
    stored_grid = replace(grid, scale_rule="given", fixed_scale=None, column_scales=True)
    is_used = mean_magnitude > 0
    log_size = torch.where(is_used, mean_magnitude, 1.0).log()
    log_size = (log_size - log_size[is_used].mean()).where(is_used, 0.0)
    best, least = None, float("inf")
    for alpha in ALPHAS:
        column_scales = (-alpha * log_size).exp()[:, None].to(DTYPES[grid.scale_dtype])
        row_scales = encode(in_scale_units(w, column_scales.float().T), grid).scales
        coded = encode(w, stored_grid, torch.cat([row_scales, column_scales]).float())
        error = float(row_output_errors(decode(coded, stored_grid) - w, hessian).sum())
        if error < least:  # never of scales that overflow their dtype: their error is not finite
            best, least = Scaled(coded, stored_grid, alpha), error
    if best is None:
        raise ValueError("weights, activations or hessian hold NaN or infinity")
    return best
