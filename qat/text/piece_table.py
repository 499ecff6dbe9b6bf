"""What a SentencePiece model file says that SentencePiece's Python does not: the kind of its
pieces, how they are joined, and what is done to a text before it is cut.

The file is a protocol buffer (sentencepiece_model.proto), whose wire format is read here: the
fields that are asked for, and nothing else. It is a file that SentencePiece has opened already.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.text.byte_table import NO_BYTE_FALLBACK

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds, as numbered there
BPE = 2  # TrainerSpec.model_type
# Fields by their numbers: of the file, of a piece, of the settings of training and of normalisation
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE = 3
CHARSMAP, ADDS_SPACE, DROPS_SPACES = 2, 3, 4
NOT_BPE = "its pieces are not joined by BPE"


@dataclass(frozen=True)
class PieceTable:
    """Texts, scores (the higher, the earlier joined) and kinds of the pieces, by their ids."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    is_bpe: bool
    charsmap: bytes  # SentencePiece's table of replaced characters; empty if none are
    adds_space: bool  # in front of every text
    drops_spaces: bool  # at the ends of a text and in runs

    @property
    def fault(self) -> str | None:
        """What keeps the tokenizers of other programs' Llamas from cutting texts as this one."""
        if not self.is_bpe:
            return NOT_BPE
        return None if BYTE in self.kinds else NO_BYTE_FALLBACK

    @staticmethod
    def read(path: Path) -> PieceTable:
        pieces: list[dict[int, Any]] = []
        parts: dict[int, dict[int, Any]] = {TRAINER: {}, NORMALIZER: {}}
        for number, value in _fields(path.read_bytes()):
            if number == PIECES:
                pieces.append(dict(_fields(value)))
            elif number in parts:  # twice is one that goes on
                parts[number] |= dict(_fields(value))
        trainer, normalizer = parts[TRAINER], parts[NORMALIZER]
        return PieceTable(
            [piece.get(TEXT, b"").decode() for piece in pieces],
            [struct.unpack("<f", piece.get(SCORE, bytes(4)))[0] for piece in pieces],
            [piece.get(KIND, NORMAL) for piece in pieces],
            trainer.get(MODEL_TYPE, 1) == BPE,
            normalizer.get(CHARSMAP, b""),
            bool(normalizer.get(ADDS_SPACE, 1)),
            bool(normalizer.get(DROPS_SPACES, 1)),
        )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or bytes of what is no varint."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire_type]
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)"""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
