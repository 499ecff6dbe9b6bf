"""``eval.py task=score``: an artifact's val_bpb from the file alone, plus validation text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from qat.artifact.bundle import count_code_bytes
from qat.evaluation.open_model import (
    GOLF_MODULE,
    GOLF_SUFFIX,
    artifact_path,
    open_model,
    open_validation,
)
from qat.evaluation.score import Score, Scorer
from qat.language.shards import TokenStream

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings


def score_artifact(path: Path, s: EvalTaskSettings) -> Score:
    """Read the file, find its validation text, score it."""
    model = open_model(path, s)
    source, tokenizer = open_validation(model, s.data)
    stream = TokenStream(source.val_files, "data.val_files")
    stream.check_ids(tokenizer.vocab_size)
    tokenizer.check_unknown(stream)
    scorer = Scorer(
        model.shape,
        stream,
        tokenizer.byte_table,
        s.seq_len or model.seq_len,
        s.eval.batch_tokens,
        s.eval.precision,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        Console(stderr=True),
    )
    if warning := tokenizer.warning:
        print(f"warning: {warning}", file=sys.stderr)
    return scorer.score(model.artifact.weights, path.name)


def run(s: EvalTaskSettings) -> int:
    path = artifact_path(s)
    score = score_artifact(path, s)
    reader = (GOLF_MODULE,) if path.suffix == GOLF_SUFFIX else ()
    artifact_bytes, code_bytes = path.stat().st_size, count_code_bytes(reader)
    print(f"artifact       {path}")
    print(f"val_bpb        {score.val_bpb:.10f}")
    print(f"val_loss       {score.val_loss:.10f}")
    print(f"tokens         {score.num_tokens}")
    print(f"text_bytes     {score.num_bytes}")
    print(f"artifact_bytes {artifact_bytes}")
    print(f"code_bytes     {code_bytes}")
    print(f"total_bytes    {artifact_bytes + code_bytes}")
    return 0
