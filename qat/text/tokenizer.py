"""SentencePiece tokenizers: train on the training split, load any, encode so that bytes add up.

SentencePiece takes U+2581 for a space. Where a text has that character itself, its three bytes are
spelled by byte pieces, which decode to it and count 3."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import ArrayLike

from qat.errors import UserError
from qat.text import byte_table as vocabulary
from qat.text.byte_table import SPACE, ByteTable
from qat.text.shards import TokenStream

BOS_ID = 1
# Appended to a model it is merged into it: normalizer_spec (3) { add_dummy_prefix (3): false }.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
SAMPLE_TOKENS = 1_000_000


class Tokenizer:
    """A SentencePiece model file, known by the SHA-256 of its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            model = path.read_bytes()
            if not model:
                raise RuntimeError("the file is empty")
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"data.tokenizer={path}: not a SentencePiece model ({reason})"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self.pieces.vocab_size()

    def encode_document(self, text: str) -> list[int]:
        """BOS and the tokens of one document; BOS alone if it is empty."""
        first, *rest = text.split(SPACE)
        ids = [BOS_ID, *self.pieces.encode(first)]
        for segment in rest:
            ids += self._space_mark + self._inside.encode(segment)
        return ids

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """The same of each, faster: SentencePiece takes a list with a thread for each core."""
        return [
            self.encode_document(text) if SPACE in text else [BOS_ID, *ids]
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


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train BPE with byte fallback on ``texts``, all of them in memory; write it to ``path``.

    No normalisation and no dropped spaces: decoding gives back exactly the text encoded.
    UserError if the text does not support ``vocab_size`` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            required_chars=SPACE,
            max_sentence_length=1 << 24,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split("] ")[-1].split()) or "there is no text to train on"
        raise UserError(f"model.vocab_size = {vocab_size}: no such vocabulary: {reason}") from None
    path.write_bytes(model.getvalue())
    tokenizer = Tokenizer(path)
    if not vocabulary.has_space_piece(tokenizer.pieces):
        raise UserError(
            f"model.vocab_size = {vocab_size}: the vocabulary has no piece for a single space, so "
            "bytes cannot be counted; try a larger one"
        )
    return tokenizer
