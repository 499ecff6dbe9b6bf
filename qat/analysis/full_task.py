"""``eval.py eval=full``: a file against the float model that it was made from, in every respect.

Writes ``metrics.json`` (numbers: docs/metrics.md) and plots, and prints one table.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.analysis.full import ARTIFACT, FLOAT, Subject, evaluate, pairs_of
from qat.analysis.full_report import draw, full_table
from qat.errors import UserError
from qat.evaluation.open_model import artifact_path, open_model, open_scorer, open_validation
from qat.evaluation.ranks import joined_ranks, rank_and_ranks
from qat.runs.float_model import SUFFIX, FloatModel, open_float
from qat.runs.run_folder import CHECKPOINT, check_writable, write_atomically
from qat.settings.terminal import print_wide
from qat.text.shards import TokenStream

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

METRICS = "metrics.json"


def run(s: EvalTaskSettings, budget: Budget) -> int:
    path = artifact_path(s)
    out = Path(s.out or path.parent / f"{path.stem}_eval")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"out={out}: a file; give the folder to write")
    with joined_ranks() as device:
        subject = _subject(path, s, device)
        pairs = pairs_of(s.eval) if "pairs" in s.eval.parts else []
        if rank_and_ranks()[0] == 0:
            check_writable(out, f"out={out}")  # before minutes are spent
        metrics = evaluate(subject, pairs, s.eval, s.seed)
        if rank_and_ranks()[0] != 0:
            return 0
    metrics = {"file": path.name, "device": str(device)} | metrics
    write_atomically(out / METRICS, json.dumps(metrics, indent=1) + "\n")
    pictures = draw(metrics, out)
    print_wide(full_table(metrics))
    for part, reason in metrics["left_out"].items():
        print(f"left out: {part}: {reason}")
    print(f"also written: {', '.join(str(out / name) for name in (METRICS, *pictures))}")
    return 0


def _subject(path: Path, s: EvalTaskSettings, device: torch.device) -> Subject:
    """Open all that ``artifact`` and ``run`` name. UserError if they do not belong together."""
    models, on_grid = {}, []
    if path.suffix == SUFFIX:
        reference: FloatModel | None = open_float(path, f"artifact={path}")
        assert reference is not None
        spec, seq_len = reference.spec, reference.settings.seq_len
        source, tokenizer = reference.open_text(s.data)
    else:
        model = open_model(path, s)
        spec, seq_len = model.spec, model.seq_len
        source, tokenizer = open_validation(model, s.data)
        reference = _reference(path, s)
        if reference is not None and reference.spec != spec:
            raise UserError(f"artifact={path}: another model than the checkpoint of its run")
    if reference is not None:
        models[FLOAT] = reference.weights
    if path.suffix != SUFFIX:
        models[ARTIFACT] = model.artifact.weights
        on_grid = [entry.name for entry in model.artifact.plan.on_grid]
    scorer = open_scorer(spec, seq_len, source, tokenizer, s.eval, device)
    training = TokenStream(source.train_files, "data.train_files") if source.train_files else None
    return Subject(models, on_grid, scorer, tokenizer, training)


def _reference(path: Path, s: EvalTaskSettings) -> FloatModel | None:
    """The checkpoint of ``run``, or beside the file; None if there is none."""
    checkpoint = (Path(s.run) if s.run else path.parent) / CHECKPOINT
    if s.run is None and not checkpoint.is_file():
        return None
    return open_float(checkpoint, f"run={checkpoint.parent}")
