"""One variant measured: its row of ``results.json``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qat.analysis.cost import Calls, calls_of, time_calls, time_in_turn
from qat.analysis.damage import damage_by_tier
from qat.analysis.minimal_pairs import accuracy
from qat.analysis.one_model import judge_reliability, read_text, right_pairs
from qat.analysis.token_scores import ScoredText
from qat.cabinet.objective import BITS_PER_BYTE, Objective
from qat.cabinet.roofline import Traffic, traffic
from qat.cabinet.summary import FLOAT
from qat.cabinet.variant import Kept, Variant, held_tensors, inner_bytes
from qat.errors import UserError
from qat.evaluation.score import Scorer

if TYPE_CHECKING:
    from qat.settings.schema import FullEvalSettings


class Evaluation(Protocol):
    """What all variants of a cabinet are measured by."""

    @property
    def objective(self) -> Objective: ...

    @property
    def throughput(self) -> str:
        """The row's key of items per second, as ``calls`` counts items."""

    @property
    def traffic(self) -> Traffic:
        """Of one call for one item."""

    def read(self, made: Kept, name: str) -> tuple[dict[str, Any], Any]:
        """Keys of the row, the objective's among them, and what ``compare`` compares."""

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        """More keys of the row, from what was read of the float model and of the variant."""

    def calls(self, made: Kept) -> Calls:
        """What ``row`` times."""

    @property
    def repeats(self) -> int: ...


class Bench:
    """Makes rows. ``float_kept``: the float model, which every other variant is compared with."""

    def __init__(self, evaluation: Evaluation, float_kept: Kept) -> None:
        self.evaluation, self._float = evaluation, float_kept
        self.device = next(float_kept.module.parameters()).device

    def read_float(self) -> None:
        """Now, not with the first row. UserError if the float model cannot be judged."""
        _ = self._reference

    @cached_property
    def _reference(self) -> tuple[dict[str, Any], Any]:
        key = self.evaluation.objective.key
        metrics, reading = self.evaluation.read(self._float, "the float model")
        if not math.isfinite(metrics[key]):
            raise UserError(f"model: the float model's {key} is {metrics[key]}, not a number")
        return metrics, reading

    def row(self, variant: Variant) -> dict[str, Any]:
        """Make the variant and measure it; a row with the reason if this machine cannot."""
        reference, before = self._reference
        head = {"variant": variant.name, "family": variant.family, "made_from": variant.made_from}
        if reason := variant.missing():
            return head | {"status": "unavailable", "reason": reason}
        started = time.monotonic()
        kept = variant.make()
        seconds = time.monotonic() - started
        objective = self.evaluation.objective
        is_float = variant.name == FLOAT
        metrics, reading = self._reference if is_float else self.evaluation.read(kept, variant.name)
        if not math.isfinite(metrics[objective.key]):
            reason = f"its {objective.key} is {metrics[objective.key]}: outputs are not finite"
            return head | {"status": "unavailable", "reason": reason}
        compared = {} if is_float else self.evaluation.compare(before, reading)
        moved, repeats = self.evaluation.traffic, self.evaluation.repeats
        calls, of_float = self.evaluation.calls(kept), self.evaluation.calls(self._float)
        cost = time_calls(calls, repeats, self.device)
        speedup = time_in_turn(calls, of_float, repeats, self.device)
        return (
            head
            | {"status": "measured", "reason": None, "make_seconds": seconds}
            | {"tiers": None}
            | metrics
            | compared
            | {
                objective.gap_key: metrics[objective.key] - reference[objective.key],
                "disk_bytes": kept.disk_bytes,  # of a file, entropy-coded
                "memory_bytes": kept.memory_bytes,  # as held, before anything is decoded
                "embedding": kept.embedding,
                "precision": kept.precision,
                "latency_ms": cost.latency_ms.median,
                self.evaluation.throughput: cost.tokens_per_second.median,
                # times as fast as the float model, timed in turn with it; low: lower quartile
                "latency_speedup": speedup.latency.median,
                "latency_speedup_low": speedup.latency.lower_quartile,
                "throughput_speedup": speedup.throughput.median,
                "throughput_speedup_low": speedup.throughput.lower_quartile,
                "peak_memory_bytes": cost.peak_memory_bytes,
                "flops": moved.flops,  # of one call
                "activation_bytes": moved.activation_bytes,
                # of the weights that the forward pass reads
                "weight_traffic_bytes": inner_bytes(held_tensors(kept.module)),
            }
        )


@dataclass(frozen=True)
class LanguageEvaluation:
    """A language model on a validation text. ``tiers`` (V,): tier of each token id."""

    scorer: Scorer
    text: ScoredText
    sentences: list[list[int]]
    tiers: np.ndarray
    settings: FullEvalSettings
    seed: int

    objective = BITS_PER_BYTE
    throughput = "tokens_per_second"

    @cached_property
    def traffic(self) -> Traffic:
        return traffic(self.scorer.spec, self.settings.seq_len or self.scorer.seq_len)

    def _scorer(self, made: Kept) -> Scorer:
        settings = replace(self.scorer.settings, precision=made.precision)
        return replace(self.scorer, module=made.module, settings=settings)

    def read(self, made: Kept, name: str) -> tuple[dict[str, Any], Any]:
        scorer = self._scorer(made)
        reading = read_text(scorer, {}, self.text, True, name)
        assert reading.temperature is not None
        temperature = reading.temperature.value
        judged = judge_reliability(
            scorer, {}, self.text, reading, {"tuned": temperature}, self.settings.num_bins, name
        )["temperatures"]
        pairs = accuracy(right_pairs(scorer, {}, self.sentences, name))
        metrics = reading.metrics | {
            "temperature": temperature,
            "ece": judged["none"]["ece_equal_width"],
            "ece_at_temperature": judged["tuned"]["ece_equal_width"],
            "reliability": judged["none"]["bins"],
            "pairs_accuracy": pairs.num_right / pairs.num_pairs,
            "pairs_low": pairs.low,
            "pairs_high": pairs.high,
        }
        return metrics, reading.scores

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        tiers = damage_by_tier(
            self.text, self.tiers, before, after, self.seed, self.settings.resamples
        )
        return {"tiers": tiers}

    def calls(self, made: Kept) -> Calls:
        return calls_of(self._scorer(made), {})

    @property
    def repeats(self) -> int:
        return self.settings.repeats
