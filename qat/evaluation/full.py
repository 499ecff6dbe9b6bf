"""Everything ``eval=full`` measures, as one nested dictionary; METRICS.md defines each number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qat.evaluation.calibration import TemperatureFit, expected_calibration_error, reliability
from qat.evaluation.cost import measure_cost
from qat.evaluation.damage import damage_by_tier
from qat.evaluation.frequency_tiers import count_tokens, tier_by_token
from qat.evaluation.generated_pairs import generated_pairs
from qat.evaluation.layer_damage import layer_damage
from qat.evaluation.minimal_pairs import (
    Pair,
    accuracy,
    accuracy_by_kind,
    are_right,
    compare,
    read_pairs,
)
from qat.evaluation.score import Scorer
from qat.evaluation.scored_text import ScoredText
from qat.evaluation.sentences import sentence_nats
from qat.evaluation.token_scores import TokenScores, scores_at, token_scores
from qat.language.shards import TokenStream
from qat.language.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qat.settings.schema import FullEvalSettings

FLOAT, ARTIFACT = "float", "artifact"
TRAINING_TOKENS = 50_000_000  # read to find out how frequent each token is


@dataclass(frozen=True)
class Subject:
    """What is evaluated: ``models`` holds the weights of FLOAT, of ARTIFACT, or of both.

    ``on_grid``: names of the tensors that the artifact holds on a grid; ``training``: None if the
    training text is not at hand.
    """

    models: Mapping[str, Mapping[str, Tensor]]
    on_grid: list[str]
    scorer: Scorer
    tokenizer: Tokenizer
    training: TokenStream | None


def evaluate(subject: Subject, settings: FullEvalSettings, seed: int) -> dict[str, Any]:
    """The parts that ``settings`` name, of all models; the same on every rank.

    ``left_out``: part -> why it could not be measured. UserError for an unusable pairs file.
    """
    pairs = _pairs(settings) if "pairs" in settings.parts else []
    text = ScoredText.of(subject.scorer)
    left_out: dict[str, str] = {}
    scores, models = _score_models(subject, text, settings)
    found: dict[str, Any] = {
        "text": {
            "tokens": len(text.targets),
            "text_bytes": int(text.num_bytes.sum(dtype=np.int64)),
            "documents": text.num_documents,
        },
        "windows": {
            "seq_len": settings.seq_len or subject.scorer.seq_len,
            "stride": settings.stride,
            "by_document": settings.by_document,
        },
        "models": models,
    }
    if "pairs" in settings.parts:
        found["pairs"] = _minimal_pairs(subject, pairs)
    if "cost" in settings.parts:
        for name, weights in subject.models.items():
            models[name]["cost"] = asdict(measure_cost(subject.scorer, weights, settings.repeats))
            if dist.is_initialized():
                dist.barrier()
    for part in ("damage", "layers"):
        if part not in settings.parts:
            continue
        if len(subject.models) < 2:
            missing = ARTIFACT if FLOAT in subject.models else f"{FLOAT} model (give run=RUN too)"
            left_out[part] = f"compares two models, and there is no {missing}"
        elif part == "layers":
            damage = layer_damage(
                subject.scorer, subject.models[FLOAT], subject.models[ARTIFACT],
                subject.on_grid, settings.layers_tokens,
            )  # fmt: skip
            found["layers"] = [asdict(layer) for layer in damage]
        elif subject.training is None:
            left_out[part] = "the training text is not at hand; give data.train_files=GLOB"
        else:
            vocab_size = subject.scorer.shape.vocab_size
            tiers = tier_by_token(count_tokens(subject.training, vocab_size, TRAINING_TOKENS))
            found["damage"] = damage_by_tier(
                text, tiers, scores[FLOAT], scores[ARTIFACT], seed, settings.resamples
            )
    return found | {"left_out": left_out}


def _pairs(settings: FullEvalSettings) -> list[Pair]:
    return read_pairs(Path(settings.pairs_file)) if settings.pairs_file else generated_pairs()


def _score_models(
    subject: Subject, text: ScoredText, settings: FullEvalSettings
) -> tuple[dict[str, TokenScores], dict[str, dict[str, Any]]]:
    """Token scores and metrics by model."""
    scores, temperatures = {}, {}
    metrics: dict[str, dict[str, Any]] = {}
    in_fit = torch.from_numpy(text.in_fit)
    for name, weights in subject.models.items():
        calibrates = "calibration" in settings.parts
        fit = TemperatureFit(subject.scorer.device) if calibrates else None
        scores[name] = token_scores(subject.scorer, weights, fit, in_fit, f"{name} weights")
        nats = scores[name].nats.double()
        val_loss = float(nats.mean())
        metrics[name] = {
            "val_loss": val_loss,
            "val_bpb": float(nats.sum()) / (math.log(2) * int(text.num_bytes.sum())),
            "perplexity": math.exp(val_loss),
            "top1_accuracy": float((scores[name].predicted.numpy() == text.targets).mean()),
        }
        if fit is not None:
            temperatures[name] = fit.best()
    for name, best in temperatures.items():
        at = {"fitted": best.value} | (
            {"floats": temperatures[FLOAT].value} if name != FLOAT and FLOAT in temperatures else {}
        )
        title = f"{name} weights, with a temperature"
        scaled = scores_at(subject.scorer, subject.models[name], list(at.values()), title)
        judged = {"none": (scores[name].nats, scores[name].confidence)} | dict(
            zip(at, scaled, strict=True)
        )
        is_right = scores[name].predicted.numpy() == text.targets
        metrics[name]["calibration"] = {
            "temperature": best.value,
            "temperature_at_edge": best.at_edge,
            "temperatures": {
                label: _calibration(nats, confidence, is_right, ~text.in_fit, settings.num_bins)
                for label, (nats, confidence) in judged.items()
            },
        }
    return scores, metrics


def _calibration(
    nats: Tensor, confidence: Tensor, is_right: np.ndarray, judged: np.ndarray, num_bins: int
) -> dict[str, Any]:
    """Of the judging half."""
    confidences, rights = confidence.numpy()[judged].clip(0.0, 1.0), is_right[judged]
    width, mass = (reliability(confidences, rights, num_bins, mass) for mass in (False, True))
    return {
        "nats_per_token": float(nats.double().numpy()[judged].mean()),
        "ece_equal_width": expected_calibration_error(width),
        "ece_equal_mass": expected_calibration_error(mass),
        "reliability": [asdict(one) for one in width],
    }


def _minimal_pairs(subject: Subject, pairs: list[Pair]) -> dict[str, Any]:
    sentences = [
        subject.tokenizer.encode_document(text) for pair in pairs for text in (pair.good, pair.bad)
    ]
    found: dict[str, Any] = {"models": {}}
    right = {}
    for name, weights in subject.models.items():
        nats = sentence_nats(subject.scorer, weights, sentences, f"pairs, {name} weights").numpy()
        right[name] = are_right(nats[::2], nats[1::2])
        kinds = {"all": accuracy(right[name])} | accuracy_by_kind(pairs, right[name])
        found["models"][name] = {kind: asdict(value) for kind, value in kinds.items()}
    if len(right) == 2:
        found["float_against_artifact"] = asdict(compare(right[FLOAT], right[ARTIFACT]))
    return found
