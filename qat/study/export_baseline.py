"""A baseline's float checkpoint stored on somebody else's grid: what rounding afterwards gives."""

from __future__ import annotations

import json
from dataclasses import replace
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
from qat.settings.schema import (
    ArtifactSettings,
    DataSettings,
    GridSettings,
    ModelSettings,
    PlanSettings,
)
from qat.study.budget_fit import TrainedModel, fit_artifact, stored_label
from qat.study.result import Result
from qat.study.run_folder import CHECKPOINT, EXPORTS, write_atomically
from qat.training.build import plan_of, shape_of
from qat.training.checkpoint import load_checkpoint
from qat.training.sensitivity import calibration_batches

Tensors = dict[str, torch.Tensor]


def stored_tensors(path: Path) -> tuple[Tensors, Tensors]:
    """Weights and learned steps that a run's checkpoint would store: its average if it has one."""
    state = load_checkpoint(path)
    if state is None or "weights" not in state:
        raise UserError(f"{path}: there is no readable checkpoint")
    averages = state["averaging"]
    if averages["weights"]["tensors"]:
        return averages["weights"]["tensors"], averages["learned_steps"]["tensors"]
    return state["weights"], state["learned_steps"]


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
    artifact = ArtifactSettings(**target["artifact"])
    label = stored_label(plan, artifact)
    known = folder / EXPORTS / f"{label}_{artifact.coder}_{plan.digest[:8]}.json"
    file = known.with_suffix(".qat")
    if known.is_file() and (file.is_file() or Path(f"{file}{OVERSIZE_SUFFIX}").is_file()):
        return json.loads(known.read_text(encoding="utf-8"))
    known.parent.mkdir(exist_ok=True)
    data = DataSettings(**s["data"])
    if not artifact.fit:  # then no training shards are needed: they may be gone, or gigabytes
        data = replace(data, train_files=None, train_shards=1)
    source = from_settings(data, shape.vocab_size)
    tokenizer = Tokenizer(source.tokenizer)
    meta = artifact_meta(shape, s["seq_len"], tokenizer.sha256, source.identity)
    weights, steps = stored_tensors(folder / CHECKPOINT)
    model = TrainedModel(shape, weights, plan, steps, is_on_grid=False)
    if artifact.fit:
        stream = TokenStream(source.train_files, "data.train_files")
        batches = calibration_batches(
            stream, artifact.fit_tokens, s["micro_batch_tokens"], s["seq_len"]
        )
        model = fit_artifact(
            model, batches, s["precision"], artifact, baseline.limit_bytes, meta,
            known.with_suffix(".png"), console,
        )  # fmt: skip
    done = export(
        model.weights, model.plan, meta, artifact.coder, file, baseline.limit_bytes, model.steps
    )
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
