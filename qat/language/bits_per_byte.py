"""Bits per byte: sum of nats in float64 / (ln 2 * UTF-8 bytes of the text that was predicted).

A byte table says how many bytes each token stands for, by the challenge's rule: control, unknown
and unused pieces stand for 0 bytes and act as a boundary; byte pieces for 1; any other piece for
its UTF-8 length without the leading U+2581, plus 1 for that space unless the previous token is a
boundary (SentencePiece puts a space in front of every text that the text does not have). Beyond
that rule, U+2581 further on in a piece is a space of 1 byte, not the mark's 3. When such counts
are not those of the text: ``vocabulary.faults``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ByteTable:
    """Per token id: its bytes without leading space (int64), leading space?, boundary? (bool)."""

    own_bytes: Tensor
    leads_with_space: Tensor
    is_boundary: Tensor

    def to(self, device: torch.device | str) -> ByteTable:
        return ByteTable(
            self.own_bytes.to(device), self.leads_with_space.to(device), self.is_boundary.to(device)
        )

    def count(self, previous_ids: Tensor, ids: Tensor) -> Tensor:
        """Bytes of each of ``ids``, given the token before each; int64 of the same shape."""
        space = self.leads_with_space[ids] & ~self.is_boundary[previous_ids]
        return self.own_bytes[ids] + space


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """ValueError if there are no bytes to divide by."""
    if num_bytes <= 0:
        raise ValueError("no bytes were predicted, so there are no bits per byte")
    return nats / (math.log(2) * num_bytes)
