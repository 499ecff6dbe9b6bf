"""What the blocks of several architectures share.

Each part is written so that a compiler has little left to read and write twice: on a GPU a training
step of a small model is bound by memory as much as by products (docs/price.md). Where nothing is
compiled, the gradient of a norm is written out: torch's takes twice as many passes.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HAS_KERNELS = torch.cuda.is_available() and find_spec("triton") is not None
if HAS_KERNELS:
    from qat.model import triton_ops  # whose operations are torch.ops.qat from here on


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype of products: bfloat16 under autocast, else as it is.

    Said once of what enters the first block, or the sums along the blocks stay float32 and every
    pass over them takes twice as long.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class _RmsNorm(torch.autograd.Function):
    """Torch's sums in torch's order forward; its gradient in half as many passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        inverse = (mean_square + torch.finfo(torch.float32).eps).rsqrt()
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        normed, inverse = ctx.saved_tensors
        along = (grad * normed).float().mean(-1, keepdim=True)
        across = torch.addcmul(grad.float(), normed.float(), along, value=-1)
        return across.mul_(inverse).to(grad.dtype)


def rms_norm(x: Tensor) -> Tensor:
    """``x`` over its root mean square along the last dimension, taken in float32."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return F.rms_norm(x, (x.size(-1),))
    normed: Tensor = _RmsNorm.apply(x)
    return normed


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


def heads_fit(head_dim: int) -> bool:
    """Whether there is a kernel that turns heads of this size."""
    return HAS_KERNELS and head_dim in triton_ops.HEAD_DIMS


def mlp_fits(dim: int, mlp_dim: int) -> bool:
    """Whether there are kernels for products of these widths."""
    return HAS_KERNELS and triton_ops.fits_tiles(dim, mlp_dim)


def asks_for_kernels(x: Tensor) -> bool:
    """Whether the kernels of triton_ops.py are to compute a block: compiled, CUDA, bfloat16.

    Everywhere else the same sums are plain torch, which is what they are checked against.
    """
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
    )
