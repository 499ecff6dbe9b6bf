"""Compares every QAT run with its no-QAT baselines on the same grid.

A baseline pairs with a QAT run if all settings but the quantization ones are equal (seed, profile,
model, clock, ...), and so are the hardware and the tokens and tokenizer that were read. If it was
stored on another grid, its float checkpoint is exported on the QAT run's grid: a real file, read
back, scored, and marked as exported. Of several baselines the mean counts, so none is picked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from qat.errors import TrainingError, UserError
from qat.study.result import Result
from qat.study.store_again import export_again

QUANTIZATION_SETTINGS = ("qat", "grid", "plan", "artifact", "limit_bytes")
QAT_OPTIMIZER_SETTINGS = ("optimizer.learned_step_lr",)  # float weights have no learned steps
BOOKKEEPING_SETTINGS = (
    "run_name",
    "sweep_name",
    "runs_dir",
    "logger",
    "resume",
    "checkpoint",
    "study",
    "ledger",
)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def identity(result: Result) -> dict[str, Any]:
    """What two runs must share to be compared; data by content, not by path."""
    left_out = (*QUANTIZATION_SETTINGS, *BOOKKEEPING_SETTINGS, "data")
    shared = {key: value for key, value in result.settings.items() if key not in left_out}
    found = flat(shared | {"data": result.data, "hardware": result.hardware})
    return {key: value for key, value in found.items() if key not in QAT_OPTIMIZER_SETTINGS}


def storage(settings: dict[str, Any]) -> str:
    """What two artifacts must share to be stored alike."""
    return json.dumps([settings["grid"], settings["plan"], settings["artifact"]], sort_keys=True)


class Target(NamedTuple):
    """How a run is to be stored: settings, and the limit if it is to fill one, else None."""

    settings: dict[str, Any]
    limit_bytes: int | None

    def is_file_of(self, settings: dict[str, Any]) -> bool:
        """A run of these settings stored it so itself."""
        has_limit = self.limit_bytes in (None, settings["limit_bytes"])
        return has_limit and storage(settings) == storage(self.settings)


def fills_limit(settings: dict[str, Any], storage: dict[str, Any]) -> bool:
    """A run of these settings, stored so, was made to fill its limit."""
    return settings["qat"].get("rate", False) or storage["artifact"]["fit"]


def beside(own: dict[str, Any], settings: dict[str, Any], storage: dict[str, Any]) -> Target:
    """How a baseline is stored to be compared with a run of these settings that is stored so.

    Alike; but beside what was made to fill a limit it is what the solver makes of the baseline for
    that limit, on grids of the baseline's ``own`` storage: there is no grid to share.
    """
    if not fills_limit(settings, storage):
        return Target(storage, None)
    artifact = storage["artifact"] | {"fit": True}
    fitted = {"grid": own["grid"], "plan": own["plan"], "artifact": artifact}
    return Target(fitted, settings["limit_bytes"])


def is_baseline(result: Result) -> bool:
    return not result.settings["qat"]["enabled"]


def _arm(qat: str, grid: str, settings: dict[str, Any]) -> str:
    averaging = settings["averaging"]
    if averaging["kind"] == "none":
        return f"{qat} on {grid}"
    return f"{qat} on {grid}, {averaging['kind']} of {averaging['of']}"


def _design(result: Result) -> str:
    """What runs share that differ in their seed alone."""
    chosen = {key: result.settings[key] for key in QUANTIZATION_SETTINGS}
    shared = identity(result) | {"seed": None}
    text = json.dumps([shared, chosen], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_of(result: Result) -> dict[str, Any]:
    """A run's row of the table, not yet compared."""
    row = {key: value for key, value in asdict(result).items() if key != "settings"}
    row["arm"] = result.arm or _arm(result.qat, result.grid, result.settings)
    row["design"] = _design(result)
    row["exported"] = False
    row["delta_bpb"] = None
    if result.artifact_bytes is not None and result.code_bytes is not None:
        row["total_bytes"] = result.artifact_bytes + result.code_bytes
    notes = [] if result.status == "finished" else [result.status.upper()]
    notes += ["QAT NEVER STARTED"] if result.qat_never_started else []
    notes += [result.error] if result.error else []
    row["note"] = "; ".join(notes)
    return row


def _exported_row(baseline: Result, exported: dict[str, Any]) -> dict[str, Any]:
    row = row_of(baseline) | exported | {"exported": True}
    row["arm"] = _arm("none", exported["grid"], baseline.settings)
    row["total_bytes"] = exported["artifact_bytes"] + exported["code_bytes"]
    row["val_bpb_snapped"] = None  # not measured on this grid
    row["quant_gap_bpb"] = exported["val_bpb_artifact"] - row["val_bpb_float"]
    oversize = "; OVERSIZE" if row["total_bytes"] > row["limit_bytes"] else ""
    row["note"] = f"exported from {baseline.run_name}{oversize}"
    return row


def row_without_result(folder: Path, status: str, note: str) -> dict[str, Any]:
    """The row of a run that has none of its own."""
    return {"arm": "?", "run_name": folder.name, "status": status, "exported": False, "note": note}


def _why_unpaired(result: Result, baselines: list[Result]) -> str:
    """Names what the nearest baseline has different."""
    wanted, nearest = identity(result), None
    for baseline in baselines:
        other = identity(baseline)
        keys = sorted(k for k in wanted.keys() | other.keys() if wanted.get(k) != other.get(k))
        if nearest is None or len(keys) < len(nearest[1]):
            nearest = baseline.run_name, keys
    if nearest is None:
        return "no baseline in this report"
    return f"no baseline in this report: {nearest[0]} differs in {', '.join(nearest[1])}"


class _Table:
    """Grows row by row; a baseline's export stands before the first arm that needed it."""

    def __init__(self, baselines: dict[Path, Result], console: Console) -> None:
        self.rows: list[dict[str, Any]] = []
        self._baselines, self._console = baselines, console
        self._exported: dict[tuple[Path, str, int], float] = {}  # val_bpb_artifact

    def add_arm(self, result: Result, val_bpb_artifact: float) -> None:
        """A QAT run's row, compared with its baselines if there are some."""
        row = row_of(result)
        notes = [row["note"]] if row["note"] else []
        equal = [
            (folder, baseline)
            for folder, baseline in self._baselines.items()
            if identity(baseline) == identity(result)
        ]
        scores = []
        for folder, baseline in equal:
            try:
                target = beside(baseline.settings, result.settings, result.settings)
                scores.append(self._score_on(folder, baseline, target))
            except (UserError, TrainingError) as error:
                notes.append(f"baseline {baseline.run_name} has no file on this grid: {error}")
        if scores:
            row["delta_bpb"] = val_bpb_artifact - mean(scores)
        if len(scores) > 1:
            notes.append(f"against the mean of {len(scores)} baselines")
        if not equal:
            notes.append(_why_unpaired(result, list(self._baselines.values())))
        row["note"] = "; ".join(notes)
        self.rows.append(row)

    def _score_on(self, folder: Path, baseline: Result, target: Target) -> float:
        """The baseline's val_bpb stored as ``target`` says, exported if need be."""
        if target.is_file_of(baseline.settings):
            assert baseline.val_bpb_artifact is not None
            return baseline.val_bpb_artifact
        limit_bytes = target.limit_bytes or baseline.limit_bytes
        key = folder, storage(target.settings), limit_bytes
        if key not in self._exported:
            exported = export_again(folder, baseline, target.settings, limit_bytes, self._console)
            self._exported[key] = exported["val_bpb_artifact"]
            self.rows.append(_exported_row(baseline, exported))
        return self._exported[key]


def build_rows(folders: list[Path], console: Console) -> list[dict[str, Any]]:
    """One row per run, by seed, baselines first; runs without a readable result come last."""
    results: dict[Path, Result] = {}
    without: list[dict[str, Any]] = []
    for folder in folders:
        try:
            result = Result.read(folder)
        except UserError as error:
            without.append(row_without_result(folder, "unreadable", str(error)))
            continue
        if result is not None:
            results[folder] = result
        else:
            note = f"{folder.name}: no result; it died or is still running"
            without.append(row_without_result(folder, "unfinished", note))
    scored = {f: r for f, r in results.items() if is_baseline(r) and r.val_bpb_float is not None}
    table = _Table(scored, console)
    by_seed = sorted(results.items(), key=lambda i: (i[1].seed, not is_baseline(i[1]), i[0].name))
    for _, result in by_seed:
        if is_baseline(result) or result.val_bpb_artifact is None:
            table.rows.append(row_of(result))
        else:
            table.add_arm(result, result.val_bpb_artifact)
    return table.rows + without
