"""Steps that are products of one per row and one per column: what they follow, and their least."""

from __future__ import annotations

import torch
from torch import Tensor

SENSITIVITY_FLOOR = 0.01  # of the tensor's mean: few batches prove nothing to be without effect


def sensitivity_factors(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> (rows, 1) and (1, columns), whose product is near it; columns around 1."""
    least = torch.finfo(sensitivity.dtype).tiny
    matrix = sensitivity + (SENSITIVITY_FLOOR * sensitivity.mean()).clamp_min(least)
    row = matrix.mean(1, keepdim=True)
    column = (matrix / row).mean(0, keepdim=True)
    at_mean = column.log().mean().exp()
    return row * at_mean, column / at_mean


def least_row_steps(w: Tensor, column_steps: Tensor, largest_code: float) -> Tensor:
    """(rows, 1): the finest steps with which all weights (rows, columns) have a code.

    ``column_steps`` (1, columns).
    """
    return (w / column_steps).abs().amax(1, keepdim=True) / largest_code
