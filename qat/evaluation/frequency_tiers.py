"""Frequency tiers: the vocabulary in three parts by how often training saw each token.

Quantization tends to cost rare tokens more than frequent ones, which a mean over tokens hides. The
tiers are cut by share of the training text, not of the vocabulary, so that they mean the same for
any vocabulary size: the head makes up half of it, head and mid nine tenths.

Counts come from the training stream, never from the text that is scored.
"""

from __future__ import annotations

import numpy as np

from qat.errors import UserError
from qat.language.shards import TokenStream

TIERS = ("head", "mid", "tail")
HEAD_TENTHS, MID_TENTHS = 5, 9  # of the training tokens; whole numbers compare exactly
CHUNK_TOKENS = 1 << 20


def count_tokens(stream: TokenStream, vocab_size: int, max_tokens: int) -> np.ndarray:
    """How often each id occurs in at most ``max_tokens`` of the stream -> (vocab_size,) int64.

    A longer stream is read in chunks at even distances from its start on. UserError if it holds an
    id outside the vocabulary.
    """
    num_tokens = min(len(stream), max_tokens)
    num_chunks = -(-num_tokens // CHUNK_TOKENS)
    skipped = len(stream) - num_tokens
    counts = np.zeros(vocab_size, dtype=np.int64)
    for k in range(num_chunks):
        start, end = k * num_tokens // num_chunks, (k + 1) * num_tokens // num_chunks
        ids = stream.take(start + k * skipped // num_chunks, end - start)
        if (highest := int(ids.max())) >= vocab_size:
            raise UserError(
                f"{stream.setting}: it holds token id {highest}, but the vocabulary ends at "
                f"{vocab_size - 1}; give the shards' own data.tokenizer"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def tier_by_token(training_counts: np.ndarray) -> np.ndarray:
    """Index into TIERS of each token id: ``training_counts`` (V,) int64 -> (V,) int8.

    From the most frequent token down (of equal ones the lower id first), tokens are head until they
    make up half of the training tokens, then mid until nine tenths; the rest is tail, and so is
    what training never saw.
    """
    order = np.argsort(-training_counts, kind="stable")
    counts = training_counts[order]
    before = np.cumsum(counts) - counts  # tokens of the training text that are more frequent
    total = counts.sum()
    tiers = np.empty(len(order), dtype=np.int8)
    is_past_head = 10 * before >= HEAD_TENTHS * total
    is_past_mid = 10 * before >= MID_TENTHS * total
    tiers[order] = is_past_head.astype(np.int8) + is_past_mid
    return tiers
