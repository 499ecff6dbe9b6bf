"""How much each weight matters: the diagonal of the loss's Hessian, estimated from training text.

The Hessian is replaced by the Fisher matrix with labels drawn from the model itself, which equals
the Gauss-Newton matrix of cross-entropy: gradients of the tokens' losses are then independent with
mean 0, so the square of a batch's mean gradient, times its tokens, is an unbiased estimate for
every weight (with the text's own labels it would not be: arXiv 1905.12558). Rounding errors have
nearly no correlation between weights, so half the sum of diagonal * error ** 2 predicts the rise
of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ptq.calibration import Batch


def fisher_diagonal(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Batch], precision: str
) -> dict[str, Tensor]:
    """Name -> float32 tensor of the weight's shape: nats per token per squared unit of weight.

    The labels are drawn with a seed of their own, so that equal weights give equal results.
    """
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(0)
    placed = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    count = 0
    for ids, _ in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits_BTV = torch.func.functional_call(model, placed, (ids.to(device),))
        logits_NV = logits_BTV.float().flatten(0, 1)
        drawn = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits_NV, drawn)
        # Zeros of what is in no product: the skips of a model of one layer are an empty tensor.
        gradients = torch.autograd.grad(loss, list(placed.values()), materialize_grads=True)
        for name, gradient in zip(placed, gradients, strict=True):
            sums[name].addcmul_(gradient, gradient, value=ids.numel())
        count += 1
    return {name: total / count for name, total in sums.items()}


@torch.inference_mode()
def mean_loss(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Batch], precision: str
) -> float:
    """Nats per token over the batches, their own labels."""
    device = next(iter(weights.values())).device
    losses = []
    for ids, targets in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            inputs = (ids.to(device), targets.to(device))
            losses.append(float(torch.func.functional_call(model, dict(weights), inputs)))
    return sum(losses) / len(losses)
