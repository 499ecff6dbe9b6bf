"""Cross-entropy of softcapped logits: a head and its loss in one.

Tokens are taken in chunks, so that all logits are never held. Each chunk's gradients are computed
right after its loss, while its logits are at hand (the loss is the last operation, so backward only
scales them): nothing is computed twice and nothing of size (tokens, vocabulary) is kept. As in
Liger Kernel (arXiv 2410.10989), with the tanh softcap of the challenge's baseline.

Compiled on CUDA, logits that are few enough are made whole: a compiler fuses all passes over them,
and chunks cost 3 % of a step (9x512 model, H100).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_CHUNKS = 8  # each is traced on its own when compiled
MIN_CHUNK_TOKENS = 1024
MAX_WHOLE_LOGITS = 2**28  # tokens * vocabulary: twice half a gigabyte in bfloat16


def softcap(raw: Tensor, cap: float) -> Tensor:
    """Float32 also under autocast: bfloat16 has no room for logits near the cap."""
    return cap * torch.tanh(raw.float() / cap)


def softcap_cross_entropy(
    hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, cap: float
) -> Tensor:
    """Mean over N of -log softmax(cap * tanh(hidden @ head.T / cap))[target], in nats."""
    if (
        torch.compiler.is_compiling()
        and hidden_NC.device.type == "cuda"
        and len(targets_N) * len(head_VC) <= MAX_WHOLE_LOGITS
    ):
        return F.cross_entropy(softcap(hidden_NC @ head_VC.mT, cap), targets_N)
    loss: Tensor = _SoftcapCrossEntropy.apply(hidden_NC, head_VC, targets_N, cap)
    return loss


class _SoftcapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, cap: float
    ) -> Tensor:
        tokens = targets_N.numel()
        chunk = max(MIN_CHUNK_TOKENS, -(-tokens // MAX_CHUNKS))
        hidden_gradients, head_gradient, losses = [], torch.zeros_like(head_VC), []
        for hidden, targets in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True):
            at_target = targets[:, None]
            # In place, for caches: a chunk's logits are some megabytes.
            capped = (hidden @ head_VC.mT).float().div_(cap).tanh_()
            logits = capped * cap
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses.append((log_sum - logits.gather(1, at_target)).sum())
            d_raw = logits.sub_(log_sum).exp_()
            d_raw.scatter_add_(1, at_target, torch.full_like(log_sum, -1.0))
            d_raw.mul_(capped.square_().neg_().add_(1)).div_(tokens)
            hidden_gradients.append((d_raw @ head_VC).to(hidden_NC.dtype))
            head_gradient += d_raw.mT @ hidden
        ctx.save_for_backward(torch.cat(hidden_gradients), head_gradient)
        return torch.stack(losses).sum() / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            hidden_gradient * d_loss.to(hidden_gradient.dtype),
            head_gradient * d_loss,
            None,
            None,
        )
