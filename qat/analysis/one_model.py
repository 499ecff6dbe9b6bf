"""One model on the validation text: its scores token by token, its calibration, its pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.analysis.minimal_pairs import are_right, sentence_nats
from qat.analysis.reliability import (
    Temperature,
    TemperatureSearch,
    expected_calibration_error,
    reliability_bins,
)
from qat.analysis.token_scores import ScoredText, TokenScores, scores_at, token_scores
from qat.evaluation.score import Scorer


@dataclass(frozen=True)
class Reading:
    """Token scores, what they come to, and the best temperature if one was searched for."""

    scores: TokenScores
    is_right: np.ndarray  # (N,) bool: the likeliest token was the target
    metrics: dict[str, float]
    temperature: Temperature | None


def read_text(
    scorer: Scorer, weights: Mapping[str, Tensor], text: ScoredText, searches: bool, title: str
) -> Reading:
    """One pass over the text; with ``searches`` a temperature is searched for on one half."""
    search = TemperatureSearch(scorer.device) if searches else None
    scores = token_scores(scorer, weights, search, torch.from_numpy(text.in_search), title)
    nats = scores.nats.double()
    val_loss = float(nats.mean())
    is_right = scores.predicted.numpy() == text.targets
    metrics = {
        "val_loss": val_loss,
        "val_bpb": float(nats.sum()) / (math.log(2) * int(text.num_bytes.sum())),
        "perplexity": math.exp(val_loss),
        "top1_accuracy": float(is_right.mean()),
    }
    return Reading(scores, is_right, metrics, None if search is None else search.best())


def judge_reliability(
    scorer: Scorer,
    weights: Mapping[str, Tensor],
    text: ScoredText,
    reading: Reading,
    temperatures: Mapping[str, float],
    num_bins: int,
    title: str,
) -> dict[str, Any]:
    """What docs/metrics.md lists under ``reliability``, as it is and at each named temperature."""
    assert reading.temperature is not None
    scaled = scores_at(scorer, weights, list(temperatures.values()), ~text.in_search, title)
    judged = {"none": (reading.scores.nats, reading.scores.confidence)}
    judged |= dict(zip(temperatures, scaled, strict=True))
    return {
        "temperature": reading.temperature.value,
        "temperature_at_edge": reading.temperature.at_edge,
        "temperatures": {
            label: _judged(nats, confidence, reading.is_right, ~text.in_search, num_bins)
            for label, (nats, confidence) in judged.items()
        },
    }


def _judged(
    nats: Tensor, confidence: Tensor, is_right: np.ndarray, chosen: np.ndarray, num_bins: int
) -> dict[str, Any]:
    confidences, rights = confidence.numpy()[chosen].clip(0.0, 1.0), is_right[chosen]
    width, mass = (reliability_bins(confidences, rights, num_bins, mass) for mass in (False, True))
    return {
        "nats_per_token": float(nats.double().numpy()[chosen].mean()),
        "ece_equal_width": expected_calibration_error(width),
        "ece_equal_mass": expected_calibration_error(mass),
        "bins": [asdict(one) for one in width],
    }


def right_pairs(
    scorer: Scorer, weights: Mapping[str, Tensor], sentences: Sequence[Sequence[int]], title: str
) -> np.ndarray:
    """(P,) bool; ``sentences`` are the good and the bad one of each pair, by turns."""
    nats = sentence_nats(scorer, weights, sentences, title).numpy()
    return are_right(nats[::2], nats[1::2])
