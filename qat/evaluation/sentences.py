"""Total log-probabilities of sentences, each a document of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from qat.evaluation.ranks import add_over_ranks, rank_and_ranks
from qat.evaluation.score import Scorer


@torch.inference_mode()
def sentence_nats(
    scorer: Scorer, weights: Mapping[str, Tensor], sentences: Sequence[Sequence[int]], title: str
) -> Tensor:
    """-ln of the probability of each sentence given its BOS: (S,) float64, on the CPU.

    ``sentences`` are token ids with BOS. Batches are dealt out to the ranks.
    """
    placed = {name: w.to(scorer.device) for name, w in weights.items()}
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    rows = max(1, scorer.settings.batch_tokens // len(sentences[order[0]]))
    batches = [order[i : i + rows] for i in range(0, len(order), rows)]
    rank, ranks = rank_and_ranks()
    totals = torch.zeros(len(sentences), dtype=torch.float64, device=scorer.device)
    quiet = rank != 0 or not scorer.console.is_terminal
    for batch in track(
        batches[rank::ranks], title, console=scorer.console, transient=True, disable=quiet
    ):
        lengths = torch.tensor([len(sentences[i]) for i in batch])
        ids = torch.zeros(len(batch), int(lengths[0]), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(sentences[i])
        ids = ids.to(scorer.device)
        bf16 = scorer.settings.precision == "bf16"
        with torch.autocast(scorer.device.type, torch.bfloat16, enabled=bf16):
            logits_BTV = torch.func.functional_call(scorer.gpt, placed, (ids[:, :-1],))
        nats_BT = F.cross_entropy(logits_BTV.mT, ids[:, 1:], reduction="none").double()
        is_target = torch.arange(1, ids.shape[1]) < lengths[:, None]
        nats_BT[~is_target.to(scorer.device)] = 0.0
        totals[torch.tensor(batch, device=scorer.device)] = nats_BT.sum(1)
    add_over_ranks(totals)
    return totals.cpu()
