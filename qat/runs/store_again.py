"""A finished run's checkpoint stored in another way, read back and scored with the run's own data.

What rounding afterwards gives a baseline on somebody else's grid, and ``eval.py task=fill``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qat.artifact.container import OVERSIZE_SUFFIX
from qat.budget.budget import Budget
from qat.budget.fill import TrainedModel, stored_label
from qat.errors import UserError
from qat.evaluation.open_model import artifact_meta
from qat.evaluation.score import Score, Scorer
from qat.quantize.gradients import rule_kinds
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan
from qat.runs.identity import CheckpointIdentity, check_same
from qat.runs.provenance import storing_code
from qat.runs.result import Result
from qat.runs.run_folder import CHECKPOINT, EXPORTS, write_atomically
from qat.runs.storing import CalibrationText, Export, Storage
from qat.settings.options import read_grid
from qat.settings.schema import (
    ArtifactSettings,
    DataSettings,
    EvalSettings,
    ModelSettings,
    PlanSettings,
    StoreSettings,
    StudySettings,
)
from qat.text.shards import TokenStream
from qat.text.source import from_settings
from qat.text.tokenizer import Tokenizer
from qat.training.build import plan_of, spec_of
from qat.training.checkpoint import load_checkpoint, tensors_to_store

Tensors = dict[str, torch.Tensor]


def read_state(path: Path) -> dict[str, Any]:
    """UserError if there is no checkpoint of a run."""
    state = load_checkpoint(path)
    if state is None:
        raise UserError(f"{path}: there is no readable checkpoint")
    return state


def stored_tensors(path: Path) -> tuple[Tensors, Tensors]:
    """Weights and learned scales that a run's checkpoint would store: its average if it has one."""
    return tensors_to_store(read_state(path))


def plan_in(settings: dict[str, Any], storage: dict[str, Any]) -> Plan:
    """The plan of one run's model on the grid and plan of another's settings (or its own)."""
    wanted = storage["plan"]
    grids = {name: Grid(**grid) for name, grid in wanted["grids"].items()}
    return plan_of(
        spec_of(ModelSettings(**settings["model"])),
        Grid(**storage["grid"]),
        PlanSettings(**wanted | {"grids": grids}),
    )


class FinishedRun:
    """A run to be stored in other ways than its own. UserError if it did not finish."""

    def __init__(self, folder: Path, result: Result, console: Console) -> None:
        if result.steps is None:
            raise UserError(f"run={folder}: the run did not finish")
        self.folder, self.result, self.console = folder, result, console
        self.settings = result.settings
        self.plan = plan_in(self.settings, self.settings)

    def store(
        self, plan: Plan, artifact: ArtifactSettings, budget: Budget, file: Path
    ) -> tuple[Export, Score]:
        """Its checkpoint by ``plan``, or filling the budget, read back and scored.

        UserError or TrainingError if its checkpoint or its data cannot be read or stored, or if
        they are no longer the run's own.
        """
        settings = self.settings
        spec = spec_of(ModelSettings(**settings["model"]))
        data = DataSettings(**settings["data"])
        reads_text = artifact.fill or artifact.method == "gptq"
        if not reads_text:  # then no training shards are needed: they may be gone, or gigabytes
            data = replace(data, train_files=None, train_shards=1)
        source = from_settings(data, spec.vocab_size)
        tokenizer = Tokenizer(source.tokenizer)
        seq_len = settings["seq_len"]
        state, text = read_state(self.folder / CHECKPOINT), None
        streams = {"val": TokenStream(source.val_files, "data.val_files")}
        if reads_text:
            streams["train"] = stream = TokenStream(source.train_files, "data.train_files")
            how = settings["micro_batch_tokens"], seq_len, settings["precision"]
            text = CalibrationText(stream, *how)
        now = CheckpointIdentity.of(settings, source, tokenizer, streams)
        check_same(f"run={self.folder}", CheckpointIdentity.held_by(state), now)
        meta = artifact_meta(spec, seq_len, tokenizer.sha256, source.identity)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights, scales = (
            {name: tensor.to(device) for name, tensor in tensors.items()}
            for tensors in tensors_to_store(state)
        )
        # Learned scales and what training saw belong to the grid that was trained on.
        is_own = plan == self.plan
        was_on = self.result.qat_last_step == self.result.steps
        sees_grid = rule_kinds()[settings["qat"]["gradient"]].is_on_grid
        is_on_grid = is_own and was_on and sees_grid
        model = TrainedModel(spec, weights, plan, scales if is_own else {}, is_on_grid)
        storage = Storage(artifact, budget, meta, text)
        done, _ = storage.store(model, file, file.with_suffix(".png"), self.console)
        scorer = Scorer(
            spec,
            streams["val"],
            tokenizer.byte_table,
            seq_len,
            EvalSettings(**settings["eval"]),
            device,
            self.console,
            bos_id=tokenizer.bos_id,
        )
        return done, scorer.score(done.artifact.weights, f"{self.folder.name} on {plan.label}")


def storage_of(
    settings: dict[str, Any], study: StudySettings, store: StoreSettings
) -> dict[str, Any]:
    """The storage settings of a run as one of its study's stores changes them."""
    option = store.grid or (None if settings["qat"]["enabled"] else study.grid)
    grid = settings["grid"] if option is None else asdict(read_grid(option))
    asked = {name: getattr(store, name) for name in ("method", "gptq_bit_price", "fill")}
    changed = {name: value for name, value in asked.items() if value is not None}
    artifact = settings["artifact"] | changed
    return {"grid": grid, "plan": settings["plan"], "artifact": artifact}


def export_code() -> str:
    """What an export is told by; a run's own file is not made by this module."""
    return storing_code("runs/store_again.py")


def export_name(plan: Plan, artifact: ArtifactSettings, budget: Budget) -> str:
    """Of an export's files, another for all that may make them others."""
    label = f"{stored_label(plan, artifact)}_{artifact.coder}_{budget.limit_bytes}"
    said = json.dumps([plan.digest, asdict(artifact)])
    return f"{label}_{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def export_again(
    folder: Path, result: Result, target: dict[str, Any], budget: Budget, console: Console
) -> dict[str, Any]:
    """Store a finished run as ``target`` says (settings: grid, plan, artifact); a finished export
    is reused. What changes of the run's row. Errors of ``FinishedRun.store``.
    """
    artifact = ArtifactSettings(**target["artifact"])
    plan = plan_in(result.settings, target)
    known = folder / EXPORTS / f"{export_name(plan, artifact, budget)}.json"
    file = known.with_suffix(".qat")
    files = file, Path(f"{file}{OVERSIZE_SUFFIX}")
    if known.is_file() and any(path.is_file() for path in files):
        row = json.loads(known.read_text(encoding="utf-8"))
        has_room = not artifact.fill or row["code_bytes"] == budget.code_bytes
        if row.get("export_code") == export_code() and has_room:
            return row
        for path in files:  # made by or beside other code; perhaps another size of it
            path.unlink(missing_ok=True)
    known.parent.mkdir(exist_ok=True)
    done, score = FinishedRun(folder, result, console).store(plan, artifact, budget, file)
    row = {
        "grid": stored_label(plan, artifact),
        "val_loss_artifact": score.val_loss,
        "val_bpb_artifact": score.val_bpb,
        "artifact_bytes": done.artifact_bytes,
        "code_bytes": budget.code_bytes,
        "limit_bytes": budget.limit_bytes,
        "storing_code": storing_code(),
        "export_code": export_code(),
    }
    write_atomically(known, json.dumps(row))
    return row
