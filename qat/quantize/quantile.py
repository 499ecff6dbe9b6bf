"""The percentile clip without a sort.

The linear-interpolated quantile of a row shorter than 1 / (1 - q) lies between its two largest
entries, so those two are all that has to be found; only longer rows are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def _rank(n: int, q: float) -> tuple[int, float]:
    """Position of the quantile among n sorted entries: the entry below it, the share of the next.

    In float32, as in ``torch.quantile``.
    """
    rank = torch.tensor(q, dtype=torch.float32) * (n - 1)
    below = int(rank.floor())
    return below, float(rank - below)


def is_among_top_two(n: int, q: float) -> bool:
    return _rank(n, q)[0] >= n - 2


def top_two(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """The largest two of each row (of a row of one entry: that one twice); (..., n) -> (...)."""
    if magnitude.size(-1) == 1:
        return magnitude[..., 0], magnitude[..., 0]
    if not torch.compiler.is_compiling():
        first, second = magnitude.topk(2, dim=-1).values.unbind(-1)
        return first, second
    # The same two by maxima alone, which a compiler fuses into one pass (topk it does not).
    first = magnitude.amax(-1)
    is_first = magnitude == first[..., None]
    runner_up = torch.where(is_first, -1.0, magnitude).amax(-1)
    return first, torch.where(is_first.float().sum(-1) > 1, first, runner_up)


def between_top_two(first: Tensor, second: Tensor, n: int, q: float) -> Tensor:
    """The quantile of rows of n entries from their largest two."""
    below, share = _rank(n, q)
    return first if below >= n - 1 else torch.lerp(second, first, share)


def row_quantile(magnitude: Tensor, q: float) -> Tensor:
    """``torch.quantile(magnitude, q, dim=-1)``, bit for bit; (..., n) -> (...), n up to 2^24."""
    n = magnitude.size(-1)
    if is_among_top_two(n, q):
        return between_top_two(*top_two(magnitude), n, q)
    return torch.quantile(magnitude, q, dim=-1)
