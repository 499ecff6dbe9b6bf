"""SmoothQuant: int8 activations, their outliers moved into the weights that read them.

``x @ w^T = (x / s) @ (w * s)^T`` for any scale per channel; with

    s = max|x| ^ alpha / max|w| ^ (1 - alpha)

both sides are about equally hard to round. W8A8 is simulated: weights ``w * s`` are snapped by
their grid, activations ``x / s`` by ``snap_tokens``, and products are float. Left out: folding 1/s
into the norm before, which concerns the model, and int8 matrix products.

Source: Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.rounding import snap

TOKEN_GRID = Grid(bits=8, scale_dtype="fp32")  # scales of activations are never stored


def migration_scales(x_amax: Tensor, weights: list[Tensor], alpha: float = 0.5) -> Tensor:
    """Scales (columns,) of the matrices (rows, columns) that share one input.

    ``x_amax`` (columns,) is the largest |x| of each channel over calibration tokens. A channel that
    is all zero in x or in the weights keeps its scale, 1. ValueError for alpha beyond 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha}: give 0 to 1")
    w_amax = torch.cat(weights).abs().amax(0)
    scales = x_amax**alpha / w_amax ** (1.0 - alpha)
    return scales.where((x_amax > 0) & (w_amax > 0), 1.0)


def snap_tokens(x: Tensor) -> Tensor:
    """Activations (..., columns) as int8 with a scale per token gives them back, float32."""
    return snap(x.reshape(-1, x.size(-1)).float(), TOKEN_GRID).view_as(x)
