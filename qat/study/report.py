"""The paired table: every QAT run beside its no-QAT baseline on the same grid.

A baseline pairs with a QAT run if all settings but the quantization ones are equal (seed, profile,
data, model, clock, ...). If it was stored on another grid, its float checkpoint is exported on the
QAT run's grid: a real file, read back, scored, and marked as exported.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.errors import UserError
from qat.study.export_baseline import export_baseline
from qat.study.result import Result
from qat.study.run_folder import CONFIG

QUANTIZATION_SETTINGS = ("qat", "grid", "plan", "artifact")
BOOKKEEPING_SETTINGS = ("run_name", "sweep_name", "runs_dir", "logger", "limit_bytes")
# column title -> (key, format)
COLUMNS = {
    "arm": ("arm", "{}"),
    "seed": ("seed", "{}"),
    "steps": ("steps", "{}"),
    "ms/step": ("ms_per_step", "{:.1f}"),
    "train s": ("train_seconds", "{:.1f}"),
    "float bpb": ("val_bpb_float", "{:.5f}"),
    "artifact bpb": ("val_bpb_artifact", "{:.5f}"),
    "gap": ("quant_gap_bpb", "{:+.5f}"),
    "vs none": ("delta_bpb", "{:+.5f}"),
    "artifact bytes": ("artifact_bytes", "{:,}"),
    "with code": ("total_bytes", "{:,}"),
    "limit": ("limit_bytes", "{:,}"),
    "QAT steps": ("qat_steps", "{}"),
    "note": ("note", "{}"),
}


def identity(settings: dict[str, Any]) -> str:
    """What two runs must share to be compared."""
    left_out = QUANTIZATION_SETTINGS + BOOKKEEPING_SETTINGS
    return json.dumps({k: v for k, v in settings.items() if k not in left_out}, sort_keys=True)


def storage(settings: dict[str, Any]) -> str:
    """What two artifacts must share to be stored alike."""
    return json.dumps([settings["grid"], settings["plan"], settings["artifact"]], sort_keys=True)


def row_of(result: Result) -> dict[str, Any]:
    """A run's row of the table."""
    row = {key: value for key, value in asdict(result).items() if key != "settings"}
    row["arm"] = f"{result.qat} on {result.grid}"
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
    row["arm"] = f"none on {exported['grid']}"
    row["total_bytes"] = exported["artifact_bytes"] + exported["code_bytes"]
    row["val_bpb_snapped"] = None  # not measured on this grid
    row["quant_gap_bpb"] = exported["val_bpb_artifact"] - baseline.val_bpb_float
    oversize = "; OVERSIZE" if row["total_bytes"] > baseline.limit_bytes else ""
    row["note"] = f"exported from {baseline.run_name}{oversize}"
    return row


def _unfinished_row(folder: Path) -> dict[str, Any]:
    return {"arm": "?", "run_name": folder.name, "status": "unfinished", "exported": False,
            "note": f"{folder.name}: no result; it died or is still running"}  # fmt: skip


def _order(folder: Path, result: Result | None) -> tuple:
    if result is None:
        return (1, 0, True, folder.name)
    return (0, result.seed, result.qat != "none", folder.name)


def build_rows(folders: list[Path], console: Console) -> list[dict[str, Any]]:
    """One row per run, by seed, baselines first; they are exported where an arm needs it."""
    read = [(folder, Result.read(folder)) for folder in folders]
    results = dict(sorted(read, key=lambda pair: _order(*pair)))
    stored: dict[tuple[str, str], dict[str, Any]] = {}  # (identity, storage) -> baseline's row
    trained: dict[str, tuple[Path, Result]] = {}  # identity -> baseline's folder and result
    for folder, result in results.items():
        if result is not None and result.qat == "none" and result.val_bpb_float is not None:
            stored[identity(result.settings), storage(result.settings)] = row_of(result)
            trained[identity(result.settings)] = folder, result
    rows: list[dict[str, Any]] = []
    for folder, result in results.items():
        if result is None:
            rows.append(_unfinished_row(folder))
            continue
        row = row_of(result)
        rows.append(row)
        if result.qat == "none" or result.val_bpb_artifact is None:
            continue
        wanted = identity(result.settings), storage(result.settings)
        if wanted not in stored and wanted[0] in trained:
            baseline_folder, baseline = trained[wanted[0]]
            exported = export_baseline(baseline_folder, baseline, result.settings, console)
            stored[wanted] = _exported_row(baseline, exported)
            rows.insert(-1, stored[wanted])
        if wanted in stored:
            row["delta_bpb"] = result.val_bpb_artifact - stored[wanted]["val_bpb_artifact"]
        else:
            row["note"] = "; ".join(filter(None, [row["note"], "no baseline in this report"]))
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    return ["" if row.get(key) is None else form.format(row[key]) for key, form in COLUMNS.values()]


def print_table(rows: list[dict[str, Any]]) -> None:
    """On stdout, as wide as it needs to be."""
    table = Table(title="QAT against its no-QAT baseline", title_justify="left")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("arm", "note") else "right")
    for row in rows:
        bad = row["status"] != "finished" or row.get("qat_never_started")
        table.add_row(*_cells(row), style="red" if bad else None)
    console = Console()
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, natural)).print(table)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)).replace("\n", " ") + " |" for row in rows]
    return "\n".join(lines) + "\n"


def run_folders(pattern: str) -> list[Path]:
    """Run folders matched by a glob; a sweep's folder stands for the runs in it."""
    found: list[Path] = []
    for name in sorted(glob.glob(pattern)):
        path = Path(name)
        inside = [path] if (path / CONFIG).is_file() else sorted(path.glob("*"))
        found += [folder for folder in inside if (folder / CONFIG).is_file()]
    if not found:
        raise UserError(f"runs={pattern}: no run folder found")
    return found


def report(pattern: str) -> list[dict[str, Any]]:
    """Print the table, write ``report.md`` and ``report.json`` beside the runs, return the rows."""
    folders = run_folders(pattern)
    rows = build_rows(folders, Console(stderr=True))
    print_table(rows)
    parent = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    (parent / "report.md").write_text(as_markdown(rows))
    (parent / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"also written: {parent / 'report.md'} and report.json")
    return rows
