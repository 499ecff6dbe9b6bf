"""``eval.py task=score``: an artifact's val_bpb from the file alone, plus validation text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.evaluation.open_model import (
    artifact_path,
    open_model,
    open_scorer,
    open_validation,
)
from qat.evaluation.ranks import joined_ranks, rank_and_ranks
from qat.evaluation.score import Score

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings


def score_artifact(path: Path, s: EvalTaskSettings, device: torch.device) -> Score:
    """Read the file, find its validation text, score it."""
    model = open_model(path, s)
    source, tokenizer = open_validation(model, s.data)
    scorer = open_scorer(model.spec, model.seq_len, source, tokenizer, s.eval, device)
    return scorer.score(model.artifact.weights, path.name)


def run(s: EvalTaskSettings, budget: Budget) -> int:
    path = artifact_path(s)
    with joined_ranks() as device:
        score = score_artifact(path, s, device)
        if rank_and_ranks()[0] != 0:
            return 0
    artifact_bytes, code_bytes = path.stat().st_size, budget.code_bytes
    print(f"artifact       {path}")
    print(f"val_bpb        {score.val_bpb:.10f}")
    print(f"val_loss       {score.val_loss:.10f}")
    part = f" of {score.of_tokens} (eval.max_tokens)" * (score.num_tokens < score.of_tokens)
    print(f"tokens         {score.num_tokens}{part}")
    print(f"text_bytes     {score.num_bytes}")
    print(f"artifact_bytes {artifact_bytes}")
    print(f"code_bytes     {code_bytes}")
    print(f"total_bytes    {artifact_bytes + code_bytes}")
    return 0
