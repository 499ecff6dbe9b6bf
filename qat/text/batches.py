"""Batches (B, T) as a pure function of the optimizer step: no loader state, nothing to restore.

Step s takes tokens [s * (batch_tokens + 1), (s + 1) * (batch_tokens + 1)) of the stream, counted
from where its shape says; x is all but the last, y all but the first. Ranks and micro-batches cut
that one span into consecutive pieces, so the data of a step does not depend on how many of them
there are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from qat.text.shards import TokenStream


@dataclass(frozen=True)
class BatchShape:
    """How a step is cut: tokens per step and sequence, ranks, micro-batches per rank; and where in
    the text step 0 begins."""

    batch_tokens: int
    seq_len: int
    world_size: int = 1
    micro_batches: int = 1
    first_token: int = 0

    @property
    def micro_batch_tokens(self) -> int:
        return self.batch_tokens // (self.world_size * self.micro_batches)


def drawn_token(stream: TokenStream, data_seed: int | None) -> int:
    """To begin with: drawn by the seed, else the first."""
    return 0 if data_seed is None else random.Random(data_seed).randrange(len(stream))


def micro_batch(
    stream: TokenStream, shape: BatchShape, step: int, rank: int, micro: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64, of one rank's micro-batch of one step."""
    piece = (micro * shape.world_size + rank) * shape.micro_batch_tokens
    start = shape.first_token + step * (shape.batch_tokens + 1) + piece
    span = torch.from_numpy(stream.take(start, shape.micro_batch_tokens + 1))
    return span[:-1].view(-1, shape.seq_len), span[1:].view(-1, shape.seq_len)


class TrainingBatches(IterableDataset):
    """Endless micro-batches of one rank: ``priming_steps`` first, then from ``first_step`` again.

    Whoever reads it stops when the clock does.
    """

    def __init__(
        self,
        stream: TokenStream,
        shape: BatchShape,
        rank: int,
        priming_steps: int,
        first_step: int = 0,
    ) -> None:
        self.stream, self.shape, self.rank = stream, shape, rank
        self.priming_steps, self.first_step = priming_steps, first_step

    def _steps(self) -> Iterator[int]:
        yield from range(self.first_step, self.first_step + self.priming_steps)
        step = self.first_step
        while True:
            yield step
            step += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in self._steps():
            for micro in range(self.shape.micro_batches):
                yield micro_batch(self.stream, self.shape, step, self.rank, micro)
