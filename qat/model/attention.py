"""Causal attention with grouped queries, by whatever is fastest where it runs.

CUDA has flash kernels. On a CPU torch's flash attention, forward and backward, takes three times as
long as the same sums written as matrix products over blocks of queries, each against the keys
before its end only (4x288 model, T = 256: 34 ms flash, 12 ms compiled blocks, 16 ms eager blocks).
Forward alone it is the fast one by as much, so scoring uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

QUERY_BLOCK = 128


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
    return _by_blocks(q_BHTD, k_BGTD, v_BGTD)


def _by_blocks(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    batch, heads, time, dim = q_BHTD.shape
    groups, before = k_BGTD.size(1), k_BGTD.size(2) - time
    queries = (q_BHTD * dim**-0.5).reshape(batch, groups, heads // groups, time, dim)
    # Once: a product of many matrices would copy them anew for every block.
    k_BGTD, v_BGTD = k_BGTD.contiguous(), v_BGTD.contiguous()
    blocks = []
    for start in range(0, time, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, time)
        # All query heads of a key head in one product.
        q = queries[:, :, :, start:end].reshape(batch, groups, -1, dim)
        seen = before + end
        scores = (q @ k_BGTD[:, :, :seen].mT).unflatten(2, (-1, end - start)).float()
        # Added, since a sum's gradient is no pass over memory; that of filling in is.
        unseen = scores.new_full((end - start, seen), float("-inf")).triu(before + start + 1)
        share = (scores + unseen).softmax(-1).to(v_BGTD.dtype).flatten(2, 3)
        blocks.append((share @ v_BGTD[:, :, :seen]).unflatten(2, (-1, end - start)))
    return torch.cat(blocks, dim=3).reshape(batch, heads, time, dim)
