"""What is scored token by token: the text, and what a model thinks of each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.analysis.reliability import TemperatureSearch, at_temperature
from qat.evaluation.ranks import add_over_ranks
from qat.evaluation.score import Scorer

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class ScoredText:
    """Arrays (N,), entry i is about the i-th target that is scored, in the order of the stream.

    ``in_search``: whether a temperature may be searched on the token; the others judge it.
    Documents take turns; if there is one only, windows do.
    """

    targets: np.ndarray  # ids, uint16
    num_bytes: np.ndarray  # UTF-8, int32
    documents: np.ndarray  # index of the document of the input, int32
    in_search: np.ndarray  # bool
    num_documents: int

    @staticmethod
    def of(scorer: Scorer) -> ScoredText:
        positions = scorer.positions
        targets = np.empty(len(positions), dtype=np.uint16)
        num_bytes = np.empty(len(positions), dtype=np.int32)
        for first in range(0, int(positions[-1]) + 1, CHUNK_TOKENS):
            low, high = np.searchsorted(positions, (first, first + CHUNK_TOKENS))
            ids = torch.from_numpy(scorer.stream.take(first, CHUNK_TOKENS + 1))
            at = positions[low:high] - first
            targets[low:high] = ids[at + 1]
            num_bytes[low:high] = scorer.byte_table.count(ids[at], ids[at + 1])
        of_input = np.searchsorted(scorer.document_starts, positions, side="right")
        found, documents = np.unique(of_input, return_inverse=True)
        seq_len = scorer.settings.seq_len or scorer.seq_len
        turns = documents if len(found) > 1 else np.arange(len(positions)) // seq_len
        return ScoredText(
            targets, num_bytes, documents.astype(np.int32), turns % 2 == 0, len(found)
        )


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
    search: TemperatureSearch | None,
    in_search: Tensor,
    title: str,
) -> TokenScores:
    """One pass over the validation text; ``search`` sees the tokens where ``in_search`` (N,) is
    true."""
    num_targets = scorer.windows.num_targets
    nats, confidence, predicted = _empty(num_targets), _empty(num_targets), _empty(num_targets)
    for batch, logits_NV in scorer.forward(weights, title):
        at = batch.positions.cpu()
        nats[at] = F.cross_entropy(logits_NV, batch.targets, reduction="none").cpu()
        highest, likeliest = logits_NV.max(-1)
        confidence[at] = (highest - logits_NV.logsumexp(-1)).exp().cpu()
        predicted[at] = likeliest.float().cpu()  # ids are below 2^16
        if search is not None:
            chosen = in_search[at].to(logits_NV.device)
            search.update(logits_NV[chosen], batch.targets[chosen])
    _join(scorer, nats, confidence, predicted, *([] if search is None else [search.sums]))
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
