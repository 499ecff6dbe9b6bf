"""``eval.py task=cabinet run=RUN``: every post-training method on one frozen checkpoint.

With ``model=DIR task_data=FILE.jsonl`` the model is somebody's classifier: ``classifier_task.py``.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.analysis.damage import count_tokens, tier_by_token
from qat.analysis.full import TRAINING_TOKENS, encode_pairs, pairs_of
from qat.analysis.token_scores import ScoredText
from qat.artifact.container import ARTIFACT
from qat.cabinet.grid_variants import file_variant
from qat.cabinet.measure import choose_variants, claim, float_kept, measure_all
from qat.cabinet.row import Bench, LanguageEvaluation
from qat.cabinet.variant import Frozen
from qat.errors import UserError
from qat.evaluation.open_model import open_scorer
from qat.ptq.calibration import (
    BATCH_SEQUENCES,
    MAX_TOKENS,
    random_sequences,
    training_sequences,
    written_sequences,
)
from qat.quantize.plan import digest_of
from qat.runs.float_model import FloatModel, open_float
from qat.runs.run_folder import CHECKPOINT
from qat.text.shards import TokenStream

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings


def run(s: EvalTaskSettings, budget: Budget) -> int:
    if s.model.path:
        # Named here: transformers is slow to import, and an extra of its own.
        return import_module("qat.cabinet.classifier_task").run(s)
    path = Path(s.artifact) if s.artifact else Path(s.run or "") / CHECKPOINT
    model = open_float(path, f"artifact={path}" if s.artifact else f"run={s.run}")
    folder = Path(s.out or path.parent / "cabinet")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation, training = _evaluation(model, s, device)
    same = {
        "weights_sha256": digest_of(model.weights),
        "validation_text": evaluation.scorer.stream.fingerprint,
        "training_text": training.fingerprint,
        "seed": s.seed,
        "eval": asdict(s.eval),
    }
    manifest = claim(folder, same, evaluation.objective)
    frozen = _frozen(model, training, evaluation, s.seed)
    artifact = path.parent / ARTIFACT
    own = [file_variant("own_artifact", artifact, frozen)] if artifact.is_file() else []
    variants = choose_variants(frozen, own, s.variants)
    measure_all(folder, manifest, variants, Bench(evaluation, float_kept(frozen)))
    return 0


def _evaluation(
    model: FloatModel, s: EvalTaskSettings, device: torch.device
) -> tuple[LanguageEvaluation, TokenStream]:
    """The texts. UserError if there is no training text: methods are calibrated on it."""
    source, tokenizer = model.open_text(s.data)
    if not source.train_files:
        raise UserError("data.train_files = null: variants are calibrated on it; give a glob")
    scorer = open_scorer(model.spec, model.settings.seq_len, source, tokenizer, s.eval, device)
    training = TokenStream(source.train_files, "data.train_files")
    tiers = tier_by_token(count_tokens(training, model.spec.vocab_size, TRAINING_TOKENS))
    sentences = encode_pairs(tokenizer, pairs_of(s.eval))
    text = ScoredText.of(scorer)
    return LanguageEvaluation(scorer, text, sentences, tiers, s.eval, s.seed), training


def _frozen(
    model: FloatModel, training: TokenStream, evaluation: LanguageEvaluation, seed: int
) -> Frozen:
    device, bos_id = evaluation.scorer.device, evaluation.scorer.bos_id
    assert bos_id is not None  # the evaluation knows where documents start
    weights = {name: w.to(device) for name, w in model.weights.items()}
    seq_len = min(model.settings.seq_len, MAX_TOKENS)

    def batches(ids_ST: torch.Tensor) -> list[torch.Tensor]:
        return list(ids_ST.to(device).split(BATCH_SEQUENCES))

    texts = {
        "train": lambda: batches(training_sequences(training, seq_len)),
        "self": lambda: batches(written_sequences(model.spec, weights, bos_id, seed)),
        "random": lambda: batches(random_sequences(model.spec, seq_len, seed)),
    }
    return Frozen.of_spec(model.spec, weights, texts)
