"""The scored tokens themselves: what they are, how many bytes, in which document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qat.evaluation.score import Scorer

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class ScoredText:
    """Arrays (N,), entry i is about the target of input position i.

    ``in_fit``: whether a temperature may be fitted on the token; the others judge it. Documents
    take turns; if there is one only, windows do.
    """

    targets: np.ndarray  # ids, uint16
    num_bytes: np.ndarray  # UTF-8, int32
    documents: np.ndarray  # index of the document of the input, int32
    in_fit: np.ndarray  # bool
    num_documents: int

    @staticmethod
    def of(scorer: Scorer) -> ScoredText:
        num_targets = scorer.windows.num_targets
        targets = np.empty(num_targets, dtype=np.uint16)
        num_bytes = np.empty(num_targets, dtype=np.int32)
        for first in range(0, num_targets, CHUNK_TOKENS):
            end = min(first + CHUNK_TOKENS, num_targets)
            ids = torch.from_numpy(scorer.stream.take(first, end - first + 1))
            targets[first:end] = ids[1:]
            num_bytes[first:end] = scorer.byte_table.count(ids[:-1], ids[1:])
        starts = scorer.document_starts[scorer.document_starts < num_targets]
        sizes = np.diff(np.append(starts, num_targets))
        documents = np.repeat(np.arange(len(starts), dtype=np.int32), sizes)
        seq_len = scorer.settings.seq_len or scorer.seq_len
        turns = documents if len(starts) > 1 else np.arange(num_targets) // seq_len
        return ScoredText(targets, num_bytes, documents, turns % 2 == 0, len(starts))
