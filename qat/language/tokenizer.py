"""SentencePiece tokenizers: train on the training split, load any, count the bytes of pieces."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch

from qat.errors import UserError
from qat.language.bits_per_byte import ByteTable
from qat.language.shards import TokenStream

SPACE = "\u2581"
BOS_ID = 1
TRAINING_TEXT_BYTES = 64_000_000
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
        """BOS and the tokens of one document."""
        return [BOS_ID, *self.pieces.encode(text)]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return [[BOS_ID, *ids] for ids in self.pieces.encode(texts)]

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def check_vocab_size(self, vocab_size: int) -> None:
        """UserError unless the model has exactly one embedding per piece."""
        if self.vocab_size != vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size}: the tokenizer {self.path} has {self.vocab_size} "
                f"pieces; set model.vocab_size={self.vocab_size}"
            )

    def tokens_per_byte(self, stream: TokenStream) -> float:
        """Tokens per UTF-8 byte over the first million tokens of a stream."""
        ids = torch.from_numpy(stream.take(0, min(len(stream), SAMPLE_TOKENS)))
        return len(ids) / max(int(self.byte_table.count(ids[:-1], ids[1:]).sum()), 1)

    @cached_property
    def byte_table(self) -> ByteTable:
        own_bytes, spaces, boundaries = [], [], []
        for token in range(self.vocab_size):
            piece = self.pieces.id_to_piece(token)
            silent = (
                self.pieces.is_control(token)
                or self.pieces.is_unknown(token)
                or self.pieces.is_unused(token)
            )
            is_byte = self.pieces.is_byte(token)
            text = "" if silent or is_byte else piece
            boundaries.append(silent)
            spaces.append(text.startswith(SPACE))
            own_bytes.append(1 if is_byte else len(text.removeprefix(SPACE).encode()))
        return ByteTable(torch.tensor(own_bytes), torch.tensor(spaces), torch.tensor(boundaries))


def countable(text: str) -> bool:
    """Whether the byte table can count this text: U+2581 itself reads as a space, so it cannot."""
    return bool(text) and SPACE not in text


def _first_bytes(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        if taken >= limit_bytes:
            return
        taken += len(text.encode())
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train BPE with byte fallback on (at most the first 64 MB of) ``texts``; write it to ``path``.

    No normalisation and no dropped spaces: decoding gives back exactly the text encoded.
    UserError if the text does not support ``vocab_size`` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_first_bytes(texts, TRAINING_TEXT_BYTES),
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
    if tokenizer.pieces.is_unknown(tokenizer.pieces.piece_to_id(SPACE)):
        raise UserError(
            f"model.vocab_size = {vocab_size}: the vocabulary has no piece for a single space, so "
            "bytes cannot be counted; try a larger one"
        )
    return tokenizer
