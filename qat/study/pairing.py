"""Compares every QAT run with its no-QAT baselines on the same grid.

A baseline pairs with a QAT run if all settings but the quantization ones are equal (seed, profile,
model, clock, ...), and so are the hardware and the tokens and tokenizer that were read. If it was
stored on another grid, its float checkpoint is exported on the QAT run's grid: a real file, read
back, scored, and marked as exported. Of several baselines the mean counts, so none is picked.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from qat.budget.budget import Budget
from qat.errors import TrainingError, UserError
from qat.golf.bundle import count_code_bytes
from qat.runs.result import Result, _arm, identity, is_baseline, row_of, row_without_result
from qat.runs.store_again import export_again


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
    return settings["qat"]["to_bytes"] or storage["artifact"]["fill"]


def beside(own: dict[str, Any], settings: dict[str, Any], storage: dict[str, Any]) -> Target:
    """How a baseline is stored to be compared with a run of these settings that is stored so.

    Alike; but beside what was made to fill a limit it is what the solver makes of the baseline for
    that limit, on grids of the baseline's ``own`` storage: there is no grid to share.
    """
    if not fills_limit(settings, storage):
        return Target(storage, None)
    artifact = storage["artifact"] | {"fill": True}
    filled = {"grid": own["grid"], "plan": own["plan"], "artifact": artifact}
    return Target(filled, settings["limit_bytes"])


def _exported_row(baseline: Result, exported: dict[str, Any]) -> dict[str, Any]:
    row = row_of(baseline) | exported | {"exported": True}
    row["arm"] = _arm("none", exported["grid"], baseline.settings)
    row["total_bytes"] = exported["artifact_bytes"] + exported["code_bytes"]
    row["val_bpb_snapped"] = None  # not measured on this grid
    row["quant_gap_bpb"] = exported["val_bpb_artifact"] - row["val_bpb_float"]
    oversize = "; OVERSIZE" if row["total_bytes"] > row["limit_bytes"] else ""
    row["note"] = f"exported from {baseline.run_name}{oversize}"
    return row


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
            budget = Budget(limit_bytes, count_code_bytes())
            exported = export_again(folder, baseline, target.settings, budget, self._console)
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
