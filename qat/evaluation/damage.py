"""Where the damage of quantization lands: rare or frequent tokens, and is the effect real?

Both models read the same tokens. Tiers are those of the training text (``frequency_tiers``);
changes come with intervals of a paired bootstrap over documents.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from qat.evaluation.bootstrap import Interval, document_sums, is_real, paired_bootstrap
from qat.evaluation.frequency_tiers import TIERS
from qat.evaluation.scored_text import ScoredText
from qat.evaluation.token_scores import TokenScores


def damage_by_tier(
    text: ScoredText,
    tier_of: np.ndarray,
    before: TokenScores,
    after: TokenScores,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """All tokens and each tier: name -> what ``METRICS.md`` lists under ``damage``.

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
