"""What a model thinks of every scored token, kept so that models can be compared token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.evaluation.calibration import TemperatureFit, at_temperature
from qat.evaluation.ranks import add_over_ranks
from qat.evaluation.score import Scorer


@dataclass(frozen=True)
class TokenScores:
    """(N,) each, on the CPU, in the order of the stream: entry i is the target of input i.

    ``nats``: -ln of the target's probability; ``confidence``: the probability of ``predicted``,
    the likeliest token.
    """

    nats: Tensor
    confidence: Tensor
    predicted: Tensor


@torch.inference_mode()
def token_scores(
    scorer: Scorer,
    weights: Mapping[str, Tensor],
    fit: TemperatureFit | None,
    in_fit: Tensor,
    title: str,
) -> TokenScores:
    """One pass over the validation text; ``fit`` sees the tokens where ``in_fit`` (N,) is true."""
    num_targets = scorer.windows.num_targets
    nats, confidence, predicted = _empty(num_targets), _empty(num_targets), _empty(num_targets)
    for batch, logits_NV in scorer.forward(weights, title):
        at = batch.positions.cpu()
        nats[at] = F.cross_entropy(logits_NV, batch.targets, reduction="none").cpu()
        highest, likeliest = logits_NV.max(-1)
        confidence[at] = (highest - logits_NV.logsumexp(-1)).exp().cpu()
        predicted[at] = likeliest.float().cpu()  # ids are below 2^16
        if fit is not None:
            chosen = in_fit[at].to(logits_NV.device)
            fit.update(logits_NV[chosen], batch.targets[chosen])
    _join(scorer, nats, confidence, predicted, *([] if fit is None else [fit.sums]))
    return TokenScores(nats, confidence, predicted.long())


@torch.inference_mode()
def scores_at(
    scorer: Scorer,
    weights: Mapping[str, Tensor],
    temperatures: list[float],
    needed: np.ndarray,
    title: str,
) -> list[tuple[Tensor, Tensor]]:
    """(nats, confidence), (N,) each, of the model at every temperature; one pass for all.

    Where ``needed`` (N,) is false they may be 0 instead.
    """
    num_targets = scorer.windows.num_targets
    found = [(_empty(num_targets), _empty(num_targets)) for _ in temperatures]
    for batch, logits_NV in scorer.forward(weights, title, needed):
        at = batch.positions.cpu()
        for temperature, (nats, confidence) in zip(temperatures, found, strict=True):
            values = at_temperature(logits_NV, batch.targets, temperature)
            nats[at], confidence[at] = (value.float().cpu() for value in values)
    _join(scorer, *(tensor for pair in found for tensor in pair))
    return found


def _empty(num_targets: int) -> Tensor:
    return torch.zeros(num_targets)


def _join(scorer: Scorer, *tensors: Tensor) -> None:
    """Every rank gets all values: each was found by one rank and is 0 on the others."""
    for tensor in tensors:
        placed = tensor.to(scorer.device)
        add_over_ranks(placed)
        tensor.copy_(placed)
