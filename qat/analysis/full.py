"""Everything ``eval=full`` measures, as one nested dictionary; docs/metrics.md defines it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from qat.analysis.cost import measure_cost
from qat.analysis.damage import count_tokens, damage_by_tier, tier_by_token
from qat.analysis.generated_pairs import generated_pairs
from qat.analysis.layer_damage import layer_damage
from qat.analysis.minimal_pairs import Pair, accuracy, accuracy_by_kind, compare, read_pairs
from qat.analysis.one_model import Reading, judge_reliability, read_text, right_pairs
from qat.analysis.token_scores import ScoredText
from qat.evaluation.score import Scorer
from qat.text.shards import TokenStream
from qat.text.tokenizer import Tokenizer

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


def evaluate(
    subject: Subject, pairs: list[Pair], settings: FullEvalSettings, seed: int
) -> dict[str, Any]:
    """The parts that ``settings`` name, of all models; the same on every rank.

    ``left_out``: part -> why it could not be measured.
    """
    text = ScoredText.of(subject.scorer)
    left_out: dict[str, str] = {}
    readings, models = _read_models(subject, text, settings)
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
            vocab_size = subject.scorer.spec.vocab_size
            tiers = tier_by_token(count_tokens(subject.training, vocab_size, TRAINING_TOKENS))
            found["damage"] = damage_by_tier(
                text,
                tiers,
                readings[FLOAT].scores,
                readings[ARTIFACT].scores,
                seed,
                settings.resamples,
            )
    return found | {"left_out": left_out}


def pairs_of(settings: FullEvalSettings) -> list[Pair]:
    """Those of ``eval.pairs_file``, else the generated ones. UserError for an unusable file."""
    return read_pairs(Path(settings.pairs_file)) if settings.pairs_file else generated_pairs()


def _read_models(
    subject: Subject, text: ScoredText, settings: FullEvalSettings
) -> tuple[dict[str, Reading], dict[str, dict[str, Any]]]:
    """Readings and metrics by model."""
    searches = "reliability" in settings.parts
    readings = {
        name: read_text(subject.scorer, weights, text, searches, f"{name} weights")
        for name, weights in subject.models.items()
    }
    metrics: dict[str, dict[str, Any]] = {name: dict(r.metrics) for name, r in readings.items()}
    for name, reading in readings.items():
        if reading.temperature is None:
            continue
        at = {"tuned": reading.temperature.value}
        of_float = readings[FLOAT].temperature if FLOAT in readings else None
        if name != FLOAT and of_float is not None:
            at["floats"] = of_float.value
        metrics[name]["reliability"] = judge_reliability(
            subject.scorer, subject.models[name], text, reading, at, settings.num_bins,
            f"{name} weights, with a temperature",
        )  # fmt: skip
    return readings, metrics


def encode_pairs(tokenizer: Tokenizer, pairs: list[Pair]) -> list[list[int]]:
    """The good and the bad sentence of each pair, by turns."""
    return [tokenizer.encode_document(text) for p in pairs for text in (p.good, p.bad)]


def _minimal_pairs(subject: Subject, pairs: list[Pair]) -> dict[str, Any]:
    sentences = encode_pairs(subject.tokenizer, pairs)
    found: dict[str, Any] = {"models": {}}
    right = {}
    for name, weights in subject.models.items():
        right[name] = right_pairs(subject.scorer, weights, sentences, f"pairs, {name} weights")
        kinds = {"all": accuracy(right[name])} | accuracy_by_kind(pairs, right[name])
        found["models"][name] = {kind: asdict(value) for kind, value in kinds.items()}
    if len(right) == 2:
        found["float_against_artifact"] = asdict(compare(right[FLOAT], right[ARTIFACT]))
    return found
