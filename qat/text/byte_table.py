"""Bits per byte, and the bytes that each token stands for.

Bits per byte: sum of nats in float64 / (ln 2 * UTF-8 bytes of the text that was predicted). A byte
table says how many bytes each token stands for, by the challenge's rule: control, unknown and
unused pieces stand for 0 bytes and act as a boundary; byte pieces for 1; any other piece for its
UTF-8 length without the leading U+2581, plus 1 for that space unless the previous token is a
boundary (SentencePiece puts a space in front of every text that the text does not have). Beyond
that rule, U+2581 further on in a piece is a space of 1 byte, not the mark's 3. When such counts are
not those of the text: ``faults``.

SentencePiece marks spaces by U+2581, in pieces and in the text it reads alike. What it does to text
before it cuts it is found by asking it (``normalize``), since its Python shows no settings of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
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


SPACE = "\u2581"
NO_SPACE_PIECE = (
    "it has no piece for a single space, so spaces are spelled, and counted, as 3 bytes"
)
NO_BYTE_FALLBACK = "it has no byte fallback, so characters without a piece lose their bytes"


def byte_piece(byte: int) -> str:
    """Name of the piece that stands for one byte."""
    return f"<0x{byte:02X}>"


def byte_table(pieces: SentencePieceProcessor) -> ByteTable:
    """Bytes of each piece, by the rule of ``bits_per_byte``."""
    own_bytes, spaces, boundaries = [], [], []
    for token in range(pieces.vocab_size()):
        is_byte = pieces.is_byte(token)
        silent = _is_silent(pieces, token)
        text = "" if silent or is_byte else pieces.id_to_piece(token)
        boundaries.append(silent)
        spaces.append(text.startswith(SPACE))
        rest = text.removeprefix(SPACE).replace(SPACE, " ")
        own_bytes.append(1 if is_byte else len(rest.encode()))
    return ByteTable(torch.tensor(own_bytes), torch.tensor(spaces), torch.tensor(boundaries))


def _is_silent(pieces: SentencePieceProcessor, token: int) -> bool:
    return pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token)


def has_space_piece(pieces: SentencePieceProcessor) -> bool:
    return not _is_silent(pieces, pieces.piece_to_id(SPACE))


def has_byte_fallback(pieces: SentencePieceProcessor) -> bool:
    """SentencePiece opens only models with all of the 256 byte pieces or none."""
    return pieces.is_byte(pieces.piece_to_id(byte_piece(0)))


def faults(pieces: SentencePieceProcessor) -> list[str]:
    """Why the bytes of tokens need not add up to those of the text; empty if they always do."""
    found = []
    if not has_space_piece(pieces):
        found.append(NO_SPACE_PIECE)
    if not has_byte_fallback(pieces):
        found.append(NO_BYTE_FALLBACK)
    if fault := normalisation_fault(pieces):
        found.append(fault)
    return found


def normalisation_fault(pieces: SentencePieceProcessor) -> str | None:
    """How text is changed before it is cut: then the bytes counted are those of another text.

    Every character of Unicode is tried; of rules for several characters only a composition is.
    """
    points = np.arange(0x110000, dtype="<u4")
    is_kept = (points < 0xD800) | (points > 0xDFFF)  # surrogates are no characters
    is_kept[[ord(" "), ord(SPACE)]] = False
    every = points[is_kept].tobytes().decode("utf-32-le")
    found = []
    if any(pieces.normalize(text).strip(SPACE) != text for text in (every, "e\u0301")):
        found.append("replaces or drops characters (NFKC and the like)")
    if pieces.normalize(" a  b ").count(SPACE) < 4:
        found.append("drops spaces at the ends of a text and in runs")
    if pieces.normalize(" a").startswith(SPACE) and not pieces.normalize("a").startswith(SPACE):
        found.append("puts no space in front of a text, so that a first one is not counted")
    if pieces.normalize("a").endswith(SPACE):
        found.append("puts a space behind a text, and that is counted")
    return f"it {', '.join(found)}: bytes of the normalised text" if found else None
