"""Parts of a GPT block on CUDA as single kernels, where a compiler writes and reads memory again.

``turned_heads``      what one product gives -> queries and keys, each head normalised (RMS) and
                      turned by its position, queries scaled by their gain; and values. Its
                      gradient is one pass too, where the compiler takes six.
``relu_squared_mlp``  relu(x @ fc.T) ** 2 @ proj.T; the square and its gradient are taken where the
                      products' results are still in registers.

Measured on an H100 in docs/price.md. All sums are float32, rounded to bfloat16 once. Bodies are
opaque to the compiler (``torch.library.custom_op``), so graphs that hold them can be cached.

The persistent product follows Triton's tutorial on persistent matrix products; that fusing ReLU^2
pays was seen in the speed runs of modded-nanogpt.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_DIMS = 32, 64, 128
TOKENS = 64  # of a program that turns heads
RMS_EPS = tl.constexpr(1.1920928955078125e-07)  # of float32, as F.rms_norm takes it
TILE = {"BN": 128, "BM": 256, "BK": 64, "num_warps": 8, "num_stages": 3}  # best of 8, H100


@triton.jit
def _halves(base, token, width, head, tokens, HALF: tl.constexpr):
    """Addresses of both halves (tokens, HALF) of a head in rows of ``width``; which are inside."""
    lane = tl.arange(0, HALF)
    at = base + token[:, None].to(tl.int64) * width + head * 2 * HALF + lane[None, :]
    return at, at + HALF, (token < tokens)[:, None] & (lane[None, :] < HALF)


@triton.jit
def _turned_kernel(
    joined, gain, cos, sin, q, k, v, tokens, time,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    low, high, inside = _halves(joined, token, (H + 2 * G) * 2 * HALF, head, tokens, HALF)
    a, b = tl.load(low, inside, 0.0).to(tl.float32), tl.load(high, inside, 0.0).to(tl.float32)
    if head < H + G:
        square = tl.sum(a * a + b * b, axis=1) / (2 * HALF)
        root = tl.rsqrt(square + RMS_EPS)[:, None]
        a, b = a * root, b * root
        angle = (token % time)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
        s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
        turned_a, turned_b = a * c + b * s, b * c - a * s
        if head < H:
            g = tl.load(gain + head).to(tl.float32)
            low, high, inside = _halves(q, token, H * 2 * HALF, head, tokens, HALF)
            tl.store(low, (turned_a * g).to(q.dtype.element_ty), inside)
            tl.store(high, (turned_b * g).to(q.dtype.element_ty), inside)
        else:
            low, high, inside = _halves(k, token, G * 2 * HALF, head - H, tokens, HALF)
            tl.store(low, turned_a.to(k.dtype.element_ty), inside)
            tl.store(high, turned_b.to(k.dtype.element_ty), inside)
    else:
        low, high, inside = _halves(v, token, G * 2 * HALF, head - H - G, tokens, HALF)
        tl.store(low, a.to(v.dtype.element_ty), inside)
        tl.store(high, b.to(v.dtype.element_ty), inside)


@triton.jit
def _turned_grad_kernel(
    joined, gain, cos, sin, dq, dk, dv, d_joined, d_gain, tokens, time,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    width = (H + 2 * G) * 2 * HALF
    into_low, into_high, inside = _halves(d_joined, token, width, head, tokens, HALF)
    if head < H + G:
        low, high, inside = _halves(joined, token, width, head, tokens, HALF)
        a, b = tl.load(low, inside, 0.0).to(tl.float32), tl.load(high, inside, 0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + RMS_EPS)[:, None]
        a, b = a * root, b * root
        angle = (token % time)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
        s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
        if head < H:
            low, high, inside = _halves(dq, token, H * 2 * HALF, head, tokens, HALF)
            da = tl.load(low, inside, 0.0).to(tl.float32)
            db = tl.load(high, inside, 0.0).to(tl.float32)
            part = tl.sum(tl.sum(da * (a * c + b * s) + db * (b * c - a * s), axis=1), axis=0)
            tl.store(d_gain + tl.program_id(0) * H + head, part)
            g = tl.load(gain + head).to(tl.float32)
            da, db = da * g, db * g
        else:
            low, high, inside = _halves(dk, token, G * 2 * HALF, head - H, tokens, HALF)
            da = tl.load(low, inside, 0.0).to(tl.float32)
            db = tl.load(high, inside, 0.0).to(tl.float32)
        back_a, back_b = da * c - db * s, da * s + db * c
        along = (tl.sum(back_a * a + back_b * b, axis=1) / (2 * HALF))[:, None]
        tl.store(into_low, (root * (back_a - a * along)).to(d_joined.dtype.element_ty), inside)
        tl.store(into_high, (root * (back_b - b * along)).to(d_joined.dtype.element_ty), inside)
    else:
        low, high, inside = _halves(dv, token, G * 2 * HALF, head - H - G, tokens, HALF)
        tl.store(into_low, tl.load(low, inside, 0.0), inside)
        tl.store(into_high, tl.load(high, inside, 0.0), inside)


@torch.library.custom_op("qat::turned_heads", mutates_args=())
def turned_heads(
    joined: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (H + 2 G) D) products, gain (H,), tables (T, D / 2) -> q (B, T, H, D), k, v of G."""
    batch, time, _ = joined.shape
    heads, half = len(gain), cos.size(-1)
    q, k, v = (
        joined.new_empty(batch, time, n, 2 * half) for n in (heads, num_kv_heads, num_kv_heads)
    )
    grid = (triton.cdiv(batch * time, TOKENS), heads + 2 * num_kv_heads)
    _turned_kernel[grid](
        joined.contiguous(), gain, cos, sin, q, k, v, batch * time, time,
        H=heads, G=num_kv_heads, HALF=half, BLOCK=TOKENS,
    )  # fmt: skip
    return q, k, v


@turned_heads.register_fake
def _(
    joined: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, _ = joined.shape
    counts = len(gain), num_kv_heads, num_kv_heads
    q, k, v = (joined.new_empty(batch, time, n, 2 * cos.size(-1)) for n in counts)
    return q, k, v


@torch.library.custom_op("qat::turned_heads_grad", mutates_args=())
def turned_heads_grad(
    joined: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``joined`` and ``gain``."""
    batch, time, _ = joined.shape
    heads, kv_heads, half = len(gain), dk.size(2), cos.size(-1)
    blocks = triton.cdiv(batch * time, TOKENS)
    d_joined = torch.empty_like(joined, memory_format=torch.contiguous_format)
    d_gain = gain.new_empty(blocks, heads, dtype=torch.float32)
    _turned_grad_kernel[(blocks, heads + 2 * kv_heads)](
        joined.contiguous(), gain, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(),
        d_joined, d_gain, batch * time, time, H=heads, G=kv_heads, HALF=half, BLOCK=TOKENS,
    )  # fmt: skip
    return d_joined, d_gain.sum(0).to(gain.dtype)


@turned_heads_grad.register_fake
def _(
    joined: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(joined, memory_format=torch.contiguous_format), torch.empty_like(gain)


def _keep_turned(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _turned_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    d_joined, d_gain = turned_heads_grad(*ctx.saved_tensors, *gradients)
    return d_joined, d_gain, None, None, None


turned_heads.register_autograd(_turned_backward, setup_context=_keep_turned)


@triton.jit
def _up_kernel(
    x, w, hidden, squared, N, M: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """hidden (N, M) = relu(x (N, K) @ w (M, K).T), and its square."""
    x_at = tl.make_tensor_descriptor(x, [N, K], [K, 1], [BN, BK])
    w_at = tl.make_tensor_descriptor(w, [M, K], [K, 1], [BM, BK])
    hidden_at = tl.make_tensor_descriptor(hidden, [N, M], [M, 1], [BN, BM // 2])
    squared_at = tl.make_tensor_descriptor(squared, [N, M], [M, 1], [BN, BM // 2])
    # Tiles after the last one lie outside: they read zeros and write nothing.
    for i in tl.range(0, ROUNDS, flatten=True):
        tile = tl.program_id(0) + i * PROGRAMS
        row, column = tile // (M // BM) * BN, tile % (M // BM) * BM
        found = tl.zeros((BN, BM), tl.float32)
        for start in range(0, K, BK):
            found = tl.dot(x_at.load([row, start]), w_at.load([column, start]).T, found)
        left, right = tl.split(tl.permute(tl.reshape(found, (BN, 2, BM // 2)), (0, 2, 1)))
        h = tl.maximum(left, 0.0).to(hidden.dtype.element_ty)
        hidden_at.store([row, column], h)
        f = h.to(tl.float32)
        squared_at.store([row, column], (f * f).to(squared.dtype.element_ty))
        h = tl.maximum(right, 0.0).to(hidden.dtype.element_ty)
        hidden_at.store([row, column + BM // 2], h)
        f = h.to(tl.float32)
        squared_at.store([row, column + BM // 2], (f * f).to(squared.dtype.element_ty))


@triton.jit
def _down_grad_kernel(
    dy, w, hidden, out, N, M: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """out (N, M) = 2 * hidden * (dy (N, K) @ w (K, M))."""
    dy_at = tl.make_tensor_descriptor(dy, [N, K], [K, 1], [BN, BK])
    w_at = tl.make_tensor_descriptor(w, [K, M], [M, 1], [BK, BM])
    hidden_at = tl.make_tensor_descriptor(hidden, [N, M], [M, 1], [BN, BM // 2])
    out_at = tl.make_tensor_descriptor(out, [N, M], [M, 1], [BN, BM // 2])
    for i in tl.range(0, ROUNDS, flatten=True):
        tile = tl.program_id(0) + i * PROGRAMS
        row, column = tile // (M // BM) * BN, tile % (M // BM) * BM
        found = tl.zeros((BN, BM), tl.float32)
        for start in range(0, K, BK):
            found = tl.dot(dy_at.load([row, start]), w_at.load([start, column]), found)
        left, right = tl.split(tl.permute(tl.reshape(found, (BN, 2, BM // 2)), (0, 2, 1)))
        h = hidden_at.load([row, column]).to(tl.float32)
        out_at.store([row, column], (2.0 * left * h).to(out.dtype.element_ty))
        h = hidden_at.load([row, column + BM // 2]).to(tl.float32)
        out_at.store([row, column + BM // 2], (2.0 * right * h).to(out.dtype.element_ty))


def fits_tiles(dim: int, mlp_dim: int) -> bool:
    """Whether the product's kernels take these widths."""
    return dim % TILE["BK"] == 0 and mlp_dim % TILE["BM"] == 0


def _launch(kernel: Any, a: Tensor, w: Tensor, b: Tensor, c: Tensor, tile: dict[str, int]) -> None:
    rows, columns = c.shape
    tiles = triton.cdiv(rows, tile["BN"]) * (columns // tile["BM"])
    on_gpu = c.device.type == "cuda"
    most = torch.cuda.get_device_properties(c.device).multi_processor_count if on_gpu else 2
    programs = min(most, tiles)
    triton.set_allocator(  # of the descriptors, in whatever thread this is
        lambda size, _align, _stream: torch.empty(size, device=c.device, dtype=torch.int8)
    )
    kernel[(programs,)](
        a, w, b, c, rows, M=columns, K=a.size(1), PROGRAMS=programs,
        ROUNDS=triton.cdiv(tiles, programs), **tile,
    )  # fmt: skip


@torch.library.custom_op("qat::relu_squared_mlp", mutates_args=())
def relu_squared_mlp(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, K), fc (M, K), proj (K, M) -> (N, K), and for its gradient relu(x @ fc.T), its square.

    All of one dtype; ``fits_tiles`` says which widths.
    """
    hidden = x.new_empty(x.size(0), fc.size(0))
    squared = torch.empty_like(hidden)
    _launch(_up_kernel, x.contiguous(), fc.contiguous(), hidden, squared, TILE)
    return squared @ proj.mT, hidden, squared


@relu_squared_mlp.register_fake
def _(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.new_empty(x.size(0), fc.size(0))
    return x.new_empty(x.shape), hidden, torch.empty_like(hidden)


@torch.library.custom_op("qat::relu_squared_mlp_grad", mutates_args=())
def relu_squared_mlp_grad(
    dy: Tensor, x: Tensor, fc: Tensor, proj: Tensor, hidden: Tensor, squared: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``fc`` and ``proj``."""
    dy, d_hidden = dy.contiguous(), torch.empty_like(hidden)
    _launch(_down_grad_kernel, dy, proj.contiguous(), hidden, d_hidden, TILE)
    return d_hidden @ fc, d_hidden.mT @ x, dy.mT @ squared


@relu_squared_mlp_grad.register_fake
def _(
    dy: Tensor, x: Tensor, fc: Tensor, proj: Tensor, hidden: Tensor, squared: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), fc.new_empty(fc.shape), proj.new_empty(proj.shape)


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1], output[2])


def _mlp_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = relu_squared_mlp_grad(dy, *ctx.saved_tensors)
    return found


relu_squared_mlp.register_autograd(_mlp_backward, setup_context=_keep_mlp)
