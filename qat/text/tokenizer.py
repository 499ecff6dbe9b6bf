"""SentencePiece tokenizers: train on the training split, load any, encode so that bytes add up.

SentencePiece takes U+2581 for a space. Where a text has that character itself, its three bytes are
spelled by byte pieces, which decode to it and count 3."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from numpy.typing import ArrayLike

from qat.errors import UserError
from qat.text import byte_table as vocabulary
from qat.text.byte_table import SPACE, ByteTable
from qat.text.shards import TokenStream

BOS_ID = 1  # of vocabularies trained here
NUM_SPECIALS = 3  # the unknown piece, BOS and EOS
SMALLEST_VOCAB_SIZE = NUM_SPECIALS + 256 + 1  # with a byte piece each, and the space
COVERAGE = 0.9995  # rarer characters are spelled in bytes, however many pieces there are
UNCOUNTED = "\0"  # SentencePiece gives it no piece, and joins none across it
LONGEST_BYTES = 1 << 24  # of a text; SentencePiece leaves out longer ones without a word
# Appended to a model it is merged into it: normalizer_spec (3) { add_dummy_prefix (3): false }.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
SAMPLE_TOKENS = 1_000_000


class Tokenizer:
    """A SentencePiece model file, known by the SHA-256 of its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"data.tokenizer={path}: {error.strerror or error}") from None
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"data.tokenizer={path}: not a SentencePiece model ({reason})"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self.pieces.vocab_size()
        found = self.pieces.bos_id()
        self.bos_id: int | None = None if found < 0 else found

    @property
    def document_start(self) -> int:
        """BOS. UserError if the vocabulary has none."""
        if self.bos_id is None:
            raise UserError(
                f"data.tokenizer={self.path}: its vocabulary has no BOS, which tells where a "
                "document starts; give a tokenizer with one, and its shards"
            )
        return self.bos_id

    def encode_document(self, text: str) -> list[int]:
        """BOS and the tokens of one document; BOS alone if it is empty."""
        first, *rest = text.split(SPACE)
        ids = [self.document_start, *self.pieces.encode(first)]
        for segment in rest:
            ids += self._space_mark + self._inside.encode(segment)
        return ids

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """The same of each, faster: SentencePiece takes a list with a thread for each core."""
        return [
            self.encode_document(text) if SPACE in text else [self.document_start, *ids]
            for text, ids in zip(texts, self.pieces.encode(texts), strict=True)
        ]

    @cached_property
    def _space_mark(self) -> list[int]:
        """U+2581 itself, byte by byte."""
        return [self.pieces.piece_to_id(vocabulary.byte_piece(byte)) for byte in SPACE.encode()]

    @cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        """The same vocabulary for text that goes on: it puts no space in front."""
        model = self.pieces.serialized_model_proto() + WITHOUT_PREFIX
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def check_vocab_size(self, vocab_size: int) -> None:
        """UserError unless the model has exactly one embedding per piece."""
        if self.vocab_size != vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size}: the tokenizer {self.path} has {self.vocab_size} "
                f"pieces; set model.vocab_size={self.vocab_size}"
            )

    def check_unknown(self, stream: TokenStream) -> None:
        """UserError if a stream to score holds unknown tokens (reads every token)."""
        if num_unknown := stream.count(self.pieces.unk_id()):
            raise UserError(
                f"{stream.setting}: {num_unknown} tokens are the unknown piece of "
                f"data.tokenizer={self.path}: their bytes are lost; give shards made by a "
                "tokenizer with byte fallback"
            )

    @property
    def warning(self) -> str | None:
        """One line if tokens spell another text than the one tokenized, else None."""
        fault = vocabulary.normalisation_fault(self.pieces)
        return f"data.tokenizer={self.path}: {fault}" if fault else None

    def tokens_per_byte(self, stream: TokenStream) -> float:
        """Tokens per UTF-8 byte over the first million tokens of a stream."""
        ids = stream.take(0, min(len(stream), SAMPLE_TOKENS))
        return len(ids) / max(self.count_bytes(ids), 1)

    def count_bytes(self, ids: ArrayLike) -> int:
        """Bytes of tokens after the first one, which is only what comes before them."""
        tokens = torch.from_numpy(np.asarray(ids, np.int64))
        return int(self.byte_table.count(tokens[:-1], tokens[1:]).sum())

    @cached_property
    def byte_table(self) -> ByteTable:
        """UserError if the vocabulary cannot spell a space as one byte."""
        if not vocabulary.has_space_piece(self.pieces):
            raise UserError(
                f"data.tokenizer={self.path}: {vocabulary.NO_SPACE_PIECE}: bits per byte would be "
                "too low; give shards and a tokenizer with such a piece"
            )
        return vocabulary.byte_table(self.pieces)


@dataclass(frozen=True)
class Characters:
    """Of a text, spaces apart: how many there are of each, by code point, most frequent first."""

    points: np.ndarray
    counts: np.ndarray
    num_spaces: int

    @staticmethod
    def of(texts: Iterable[str]) -> Characters:
        counts = np.zeros(0x110000, np.int64)
        for text in texts:
            points = np.frombuffer(text.encode("utf-32-le"), "<u4")
            found, times = np.unique(points, return_counts=True)
            counts[found] += times
        num_spaces = int(counts[[ord(" "), ord(SPACE)]].sum())
        counts[[ord(" "), ord(SPACE), ord(UNCOUNTED)]] = 0
        points = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return Characters(points, counts[points], num_spaces)

    @property
    def num_common(self) -> int:
        """The fewest that make up ``COVERAGE`` of the text."""
        covered = self.num_spaces + np.append(0, self.counts.cumsum())
        return int(np.searchsorted(covered, COVERAGE * covered[-1]))

    def share(self, first: int) -> float:
        """Of the text that is made of the characters from the ``first`` on."""
        return float(self.counts[first:].sum() / (self.counts.sum() + self.num_spaces))


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, path: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """Train BPE with byte fallback on ``texts``, write it to ``path``; also what is to be said of
    its characters.

    No normalisation and no dropped spaces: decoding gives back exactly the text encoded. The common
    characters have a piece, but take half of those that are left at most: joined ones save more
    tokens (of English, 20 to 30 of 60 do best). The rare ones are spelled in bytes. UserError names
    the smallest or the largest ``vocab_size`` that this text supports.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size = {vocab_size}: the smallest vocabulary for text has "
            f"{SMALLEST_VOCAB_SIZE} pieces ({NUM_SPECIALS} specials, 256 bytes, the space)"
        )
    longest = LONGEST_BYTES // 4  # characters
    texts = [text[i : i + longest] for text in texts for i in range(0, len(text), longest)]
    characters, room = Characters.of(texts), vocab_size - SMALLEST_VOCAB_SIZE
    for kept in (min(characters.num_common, room // 2), min(len(characters.points), room)):
        rare = re.escape("".join(map(chr, characters.points[kept:])))
        without = partial(re.compile(f"[{rare}]").sub, UNCOUNTED) if rare else str
        model, largest = _trained(map(without, texts), vocab_size)
        if model is not None:
            break
    else:  # with few characters there may be too little to join, but not with all of them
        raise UserError(
            f"model.vocab_size = {vocab_size}: this text makes {largest} pieces at most; give "
            f"model.vocab_size={largest} or less, or more text"
        )
    path.write_bytes(model)
    notes = {
        "characters": len(characters.points),
        "byte_characters": len(characters.points) - kept,
        "byte_characters_share": characters.share(kept),
    }
    return Tokenizer(path), notes


def _trained(texts: Iterable[str], vocab_size: int) -> tuple[bytes | None, int]:
    """A model, or None if there are not so many pieces; and how many there are."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            bos_id=BOS_ID,
            character_coverage=1.0,  # of what was not taken out
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            required_chars=SPACE,
            max_sentence_length=LONGEST_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"too high .* a value <= (\d+)", str(error)):
            return None, int(found[1])
        reason = " ".join(str(error).split("] ")[-1].split()) or "it found no text"
        raise UserError(f"model.vocab_size = {vocab_size}: SentencePiece: {reason}") from None
    return model.getvalue(), vocab_size
