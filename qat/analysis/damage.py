"""Where the damage of quantization lands: rare or frequent tokens, and is the effect real?

The vocabulary is cut into three tiers by how often training saw each token: quantization tends to
cost rare tokens more than frequent ones, which a mean over tokens hides. Tiers are cut by share of
the training text, not of the vocabulary, so that they mean the same for any vocabulary size: the
head makes up half of it, head and mid nine tenths. Counts come from the training stream, never from
the text that is scored.

Both models read the same tokens; changes come with intervals of a paired bootstrap over documents.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from qat.analysis.intervals import Interval, document_sums, is_real, paired_bootstrap
from qat.analysis.token_scores import ScoredText, TokenScores
from qat.errors import UserError
from qat.text.shards import TokenStream

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


def damage_by_tier(
    text: ScoredText,
    tier_of: np.ndarray,
    before: TokenScores,
    after: TokenScores,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """All tokens and each tier: name -> what ``docs/metrics.md`` lists under ``damage``.

    ``tier_of`` (V,): index into TIERS of each token id. A tier without tokens has no entry.
    """
    tiers = tier_of[text.targets]
    nats = [scores.nats.double().numpy() for scores in (before, after)]
    predicted = [scores.predicted.numpy() for scores in (before, after)]
    right = [p == text.targets for p in predicted]
    flipped = predicted[0] != predicted[1]

    def change(chosen: np.ndarray, values: np.ndarray, per: np.ndarray, scale: float) -> Interval:
        changes, denominators = (
            document_sums(v[chosen], text.documents[chosen], text.num_documents)
            for v in (values, per)
        )
        return paired_bootstrap(changes, denominators, seed, scale, resamples)

    found = {}
    for name in ("all", *TIERS):
        chosen = np.full(len(tiers), True) if name == "all" else tiers == TIERS.index(name)
        num_tokens, num_bytes = int(chosen.sum()), int(text.num_bytes[chosen].sum())
        if not num_tokens or not num_bytes:
            continue
        in_bits = 1 / math.log(2)
        bpb = change(chosen, nats[1] - nats[0], text.num_bytes, in_bits)
        accuracy = change(chosen, right[1].astype(np.int8) - right[0], np.ones_like(tiers), 1.0)
        num_flipped = int(flipped[chosen].sum())
        found[name] = {
            "tokens": num_tokens,
            "text_bytes": num_bytes,
            "val_bpb_float": in_bits * float(nats[0][chosen].sum()) / num_bytes,
            "val_bpb_artifact": in_bits * float(nats[1][chosen].sum()) / num_bytes,
            "top1_accuracy_float": float(right[0][chosen].mean()),
            "top1_accuracy_artifact": float(right[1][chosen].mean()),
            "delta_bpb": asdict(bpb) | {"is_real": is_real(bpb, num_flipped)},
            "delta_top1_accuracy": asdict(accuracy) | {"is_real": is_real(accuracy, num_flipped)},
            "flipped_predictions": num_flipped,
        }
    return found
