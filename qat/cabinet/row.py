"""One variant measured: its row of ``results.json``, keys named as in docs/metrics.md."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qat.analysis.cost import measure_cost
from qat.analysis.damage import damage_by_tier
from qat.analysis.minimal_pairs import accuracy
from qat.analysis.one_model import judge_reliability, read_text, right_pairs
from qat.analysis.token_scores import ScoredText, TokenScores
from qat.cabinet.roofline import traffic
from qat.cabinet.variant import Kept, Variant, inner_bytes
from qat.evaluation.score import Scorer

if TYPE_CHECKING:
    from qat.settings.schema import FullEvalSettings


@dataclass(frozen=True)
class Reference:
    """The float32 model, which every other variant is compared with, token by token."""

    scores: TokenScores
    val_bpb: float


@dataclass(frozen=True)
class Bench:
    """What all variants are measured on. ``tiers`` (V,): tier of each token id."""

    scorer: Scorer
    text: ScoredText
    sentences: list[list[int]]
    tiers: np.ndarray
    settings: FullEvalSettings
    seed: int

    def reference(self, weights: Mapping[str, Tensor]) -> Reference:
        reading = read_text(self.scorer, weights, self.text, False, "the float model")
        return Reference(reading.scores, reading.metrics["val_bpb"])

    def row(self, variant: Variant, reference: Reference) -> dict[str, Any]:
        """Make the variant and measure it; a row with the reason if this machine cannot."""
        head = {"variant": variant.name, "family": variant.family}
        if reason := variant.missing():
            return head | {"status": "unavailable", "reason": reason}
        started = time.monotonic()
        kept = variant.make()
        seconds = time.monotonic() - started
        return head | {"status": "measured", "reason": None, "make_seconds": seconds} | self._of(
            variant.name, kept, reference
        )  # fmt: skip

    def _of(self, name: str, kept: Kept, reference: Reference) -> dict[str, Any]:
        s, scorer = self.settings, self.scorer
        scorer = replace(
            scorer, module=kept.module, settings=replace(scorer.settings, precision=kept.precision)
        )
        weights = {} if kept.module is not None else kept.weights
        reading = read_text(scorer, weights, self.text, True, name)
        assert reading.temperature is not None
        temperature = reading.temperature.value
        judged = judge_reliability(
            scorer, weights, self.text, reading, {"tuned": temperature}, s.num_bins, name
        )["temperatures"]
        pairs = accuracy(right_pairs(scorer, weights, self.sentences, name))
        cost = measure_cost(scorer, weights, s.repeats)
        seq_len = s.seq_len or scorer.seq_len
        held = kept.weights.values() if kept.module is None else _tensors(kept.module)
        weight_bytes = inner_bytes(held)
        flops, activation_bytes = traffic(scorer.spec, seq_len)
        return reading.metrics | {
            "gap_bpb": reading.metrics["val_bpb"] - reference.val_bpb,
            "disk_bytes": kept.disk_bytes,  # of a file, entropy-coded
            "memory_bytes": kept.memory_bytes,  # as held, before anything is decoded
            "embedding": kept.embedding,
            "precision": kept.precision,
            "temperature": temperature,
            "ece": judged["none"]["ece_equal_width"],
            "ece_at_temperature": judged["tuned"]["ece_equal_width"],
            "reliability": judged["none"]["bins"],
            "tiers": None
            if name == "fp32"
            else damage_by_tier(
                self.text, self.tiers, reference.scores, reading.scores, self.seed, s.resamples
            ),
            "pairs_accuracy": pairs.num_right / pairs.num_pairs,
            "pairs_low": pairs.low,
            "pairs_high": pairs.high,
            "latency_ms": cost.latency_ms.median,
            "tokens_per_second": cost.tokens_per_second.median,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "flops": flops,  # of one sequence
            "activation_bytes": activation_bytes,
            "weight_traffic_bytes": weight_bytes,  # of the weights that the forward pass reads
        }


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
