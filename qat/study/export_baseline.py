"""A baseline's float checkpoint stored on somebody else's grid: what rounding afterwards gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qat.artifact.export import OVERSIZE_SUFFIX, export
from qat.errors import UserError
from qat.evaluation.open_model import artifact_meta
from qat.evaluation.score import Scorer
from qat.language.shards import TokenStream
from qat.language.source import from_settings
from qat.language.tokenizer import Tokenizer
from qat.settings.schema import DataSettings, GridSettings, ModelSettings, PlanSettings
from qat.study.result import Result
from qat.study.run_folder import CHECKPOINT, EXPORTS, write_atomically
from qat.training.build import plan_of, shape_of
from qat.training.checkpoint import load_checkpoint


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a run's checkpoint would store, averaged if the run averages, by the model's names."""
    state = load_checkpoint(path)
    if state is None or "weights" not in state:
        raise UserError(f"{path}: there is no readable checkpoint")
    return state["averaging"]["weights"]["tensors"] or state["weights"]


def export_baseline(
    folder: Path, baseline: Result, target: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Store the baseline as ``target`` settings say and score it; a finished export is reused.

    UserError or TrainingError if its checkpoint or its data cannot be read or stored.
    """
    s = baseline.settings
    shape = shape_of(ModelSettings(**s["model"]))
    wanted = target["plan"]
    grids = {name: GridSettings(**grid) for name, grid in wanted["grids"].items()}
    plan = plan_of(shape, GridSettings(**target["grid"]), PlanSettings(**wanted | {"grids": grids}))
    label = plan.label
    coder = target["artifact"]["coder"]
    known = folder / EXPORTS / f"{label}_{coder}_{plan.digest[:8]}.json"
    file = known.with_suffix(".qat")
    if known.is_file() and (file.is_file() or Path(f"{file}{OVERSIZE_SUFFIX}").is_file()):
        return json.loads(known.read_text(encoding="utf-8"))
    known.parent.mkdir(exist_ok=True)
    # Scoring needs no training shards: theirs may be gone, or gigabytes to fetch.
    data = DataSettings(**s["data"] | {"train_files": None, "train_shards": 1})
    source = from_settings(data, shape.vocab_size)
    tokenizer = Tokenizer(source.tokenizer)
    meta = artifact_meta(shape, s["seq_len"], tokenizer.sha256, source.identity)
    weights = checkpoint_weights(folder / CHECKPOINT)
    done = export(weights, plan, meta, coder, file, baseline.limit_bytes)
    scorer = Scorer(
        shape,
        TokenStream(source.val_files, "data.val_files"),
        tokenizer.byte_table,
        s["seq_len"],
        s["eval"]["batch_tokens"],
        s["eval"]["precision"],
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        console,
    )
    score = scorer.score(done.artifact.weights, f"{folder.name} on {label}")
    row = {
        "grid": label,
        "val_loss_artifact": score.val_loss,
        "val_bpb_artifact": score.val_bpb,
        "artifact_bytes": done.artifact_bytes,
        "code_bytes": done.code_bytes,
    }
    write_atomically(known, json.dumps(row))
    return row
