"""The percentile clip without a sort.

The linear-interpolated quantile of a row shorter than 1 / (1 - q) lies between its two largest
entries, so ``torch.topk`` of two finds it; only longer rows are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_quantile(magnitude: Tensor, q: float) -> Tensor:
    """``torch.quantile(magnitude, q, dim=-1)``, bit for bit; (..., n) -> (...), n up to 2^24."""
    n = magnitude.size(-1)
    rank = torch.tensor(q, dtype=torch.float32) * (n - 1)
    below = int(rank.floor())
    if n == 1 or below == n - 1:
        return magnitude.amax(-1)
    if below < n - 2:
        return torch.quantile(magnitude, q, dim=-1)
    first, second = magnitude.topk(2, dim=-1).values.unbind(-1)
    return torch.lerp(second, first, float(rank - below))
