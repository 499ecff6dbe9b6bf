"""What the blocks of several architectures share.

Each part is written so that a compiler has little left to read and write twice: on a GPU a training
step of a small model is bound by memory as much as by products (docs/price.md).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype of products: bfloat16 under autocast, else as it is.

    Said once of what enters the first block, or the sums along the blocks stay float32 and every
    pass over them takes twice as long.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


@lru_cache(maxsize=16)
def _cached_tables(
    end: int, half: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(half, device=device, dtype=torch.float32) / half
        position = torch.arange(end, device=device, dtype=torch.float32)
        angle_TD = torch.outer(position, base**-exponent)
        return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)


@torch.compiler.assume_constant_result
def _rotary_tables(
    end: int, half: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Made once: in a compiled graph every kernel that turns a head would compute them again."""
    return _cached_tables(end, half, base, device, dtype)


def rotary_angles(x_BTHD: Tensor, base: float, first_position: int = 0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, D / 2), of ``x``'s dtype, of position * base ** (-2 i / D).

    By them the pair (i, i + D / 2) of each head is turned, in the direction that its architecture
    takes (arXiv 2104.09864).
    """
    end, half = first_position + x_BTHD.size(1), x_BTHD.size(-1) // 2
    tables = _rotary_tables(end, half, base, x_BTHD.device, x_BTHD.dtype)
    cos, sin = (table[first_position:, None] for table in tables)
    return cos, sin


def products(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """What each of several layers without bias makes of one input.

    Compiled on CUDA it is one product with all their matrices, which reads the input once and sums
    its gradient inside.
    """
    if torch.compiler.is_compiling() and x.device.type == "cuda":
        joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
        return list(joined.split([layer.out_features for layer in layers], dim=-1))
    return [layer(x) for layer in layers]
