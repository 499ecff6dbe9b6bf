"""Causal attention with grouped queries, by whatever is fastest where it runs.

CUDA has flash kernels. On a CPU torch's flash attention, forward and backward, takes twice as long
as the same sums written as matrix products over blocks of queries, each against the keys before its
end only (4x288 model, T = 256, compiled: 52 ms flash, 24 ms blocks with their gradient written out,
41 ms with torch's). Forward alone it is the fast one, so scoring uses it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

QUERY_BLOCK = 64


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    """(B, H, T, D) queries over G key and value heads, G dividing H -> (B, H, T, D).

    There may be fewer queries than keys: they are the last ones then.
    """
    queries, keys, is_cuda = q_BHTD.size(2), k_BGTD.size(2), q_BHTD.device.type == "cuda"
    if is_cuda or not torch.is_grad_enabled():
        is_grouped = q_BHTD.size(1) != k_BGTD.size(1)
        if is_grouped and is_cuda and (q_BHTD.dtype == torch.float32 or queries < keys):
            # These kernels know no groups: torch would write out all T x T scores.
            copies = q_BHTD.size(1) // k_BGTD.size(1)
            k_BGTD, v_BGTD = (t.repeat_interleave(copies, dim=1) for t in (k_BGTD, v_BGTD))
            is_grouped = False
        # is_causal would take fewer queries for the first ones
        mask = causal_lower_right(queries, keys) if queries < keys else None
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
        )
    unseen_QT = _unseen(keys, q_BHTD.device)
    return _ByBlocks.apply(q_BHTD, k_BGTD, v_BGTD, unseen_QT)


class _ByBlocks(torch.autograd.Function):
    """Its gradient is written out. Torch's own would leave that of keys transposed, and fill each
    block's up with zeros to be summed: every pass over memory after it takes longer."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, unseen_QS: Tensor
    ) -> Tensor:
        batch, heads, time, dim = q_BHTD.shape
        groups = k_BGSD.size(1)
        # All query heads of a key head in one product.
        queries = (q_BHTD * dim**-0.5).reshape(batch, groups, heads // groups, time, dim)
        # Once: a product of many matrices would copy them anew for every block.
        k_BGSD, v_BGSD = k_BGSD.contiguous(), v_BGSD.contiguous()
        attended, kept = [], []
        for block, seen in _blocks(time, k_BGSD.size(2)):
            q = queries[:, :, :, block].flatten(2, 3)
            scores = (q @ k_BGSD[:, :, :seen].mT).unflatten(2, (heads // groups, -1)).float()
            # Added, since filling in is one more pass over memory.
            unseen = unseen_QS[-scores.size(3) :, -seen:]
            share = (scores + unseen).softmax(-1).to(v_BGSD.dtype).flatten(2, 3)
            attended.append((share @ v_BGSD[:, :, :seen]).unflatten(2, (heads // groups, -1)))
            kept += [q, share]
        ctx.save_for_backward(k_BGSD, v_BGSD, *kept)
        return torch.cat(attended, dim=3).reshape(batch, heads, time, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k_BGSD, v_BGSD, *kept = ctx.saved_tensors
        batch, heads, time, dim = grad_BHTD.shape
        groups = k_BGSD.size(1)
        grads = grad_BHTD.reshape(batch, groups, heads // groups, time, dim)
        of_queries, of_keys, of_values = [], [], []
        for (block, seen), q, share in zip(
            _blocks(time, k_BGSD.size(2)), kept[::2], kept[1::2], strict=True
        ):
            grad = grads[:, :, :, block].flatten(2, 3)
            of_values.append(share.mT @ grad)
            of_share = (grad @ v_BGSD[:, :, :seen].mT).float()
            of_scores = torch._softmax_backward_data(of_share, share.float(), -1, torch.float32)
            of_scores = of_scores.to(share.dtype)
            of_q = (of_scores @ k_BGSD[:, :, :seen]) * dim**-0.5
            of_queries.append(of_q.unflatten(2, (heads // groups, -1)))
            of_keys.append(of_scores.mT @ q)
        queries = torch.cat(of_queries, dim=3).reshape(grad_BHTD.shape)
        return queries, _summed(of_keys), _summed(of_values), None


def _blocks(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Of queries, and how many keys the last of each sees; the last query sees all."""
    ends = [min(start + QUERY_BLOCK, queries) for start in range(0, queries, QUERY_BLOCK)]
    starts = [0, *ends[:-1]]
    return [(slice(a, b), keys - queries + b) for a, b in zip(starts, ends, strict=True)]


@lru_cache(maxsize=16)
def _cached_unseen(keys: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        table = torch.full((QUERY_BLOCK, keys), float("-inf"), device=device)
        return table.triu(keys - QUERY_BLOCK + 1)


@torch.compiler.assume_constant_result
def _unseen(keys: int, device: torch.device) -> Tensor:
    """To be added to the scores of the last block of queries; its last columns and rows are for
    blocks that see fewer keys, or are shorter. Made once: a compiled softmax would compute it in
    each of its passes."""
    return _cached_unseen(keys, device)


def _summed(parts_BGsD: list[Tensor]) -> Tensor:
    """Each is longer than the one before it, and begins where that does."""
    pieces, start = [], 0
    for i, part in enumerate(parts_BGsD):
        end = part.size(2)
        total = part[:, :, start:].float()
        for longer in parts_BGsD[i + 1 :]:
            total = total + longer[:, :, start:end].float()
        pieces.append(total)
        start = end
    return torch.cat(pieces, dim=2).to(parts_BGsD[0].dtype)
