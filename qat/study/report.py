"""The paired table, every QAT run beside its no-QAT baseline, and a verdict on each arm's seeds."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.errors import UserError
from qat.evaluation.print_wide import print_wide
from qat.study.pairing import build_rows
from qat.study.run_folder import CONFIG, write_atomically
from qat.study.verdicts import verdict_lines

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
    "run": ("run_name", "{}"),
    "note": ("note", "{}"),
}


def _cells(row: dict[str, Any]) -> list[str]:
    return ["" if row.get(key) is None else form.format(row[key]) for key, form in COLUMNS.values()]


def print_table(rows: list[dict[str, Any]]) -> None:
    """On stdout, as wide as it needs to be."""
    table = Table(title="QAT against its no-QAT baseline", title_justify="left")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("arm", "run", "note") else "right")
    for row in rows:
        bad = row["status"] != "finished" or row.get("qat_never_started")
        table.add_row(*_cells(row), style="red" if bad else None)
    print_wide(table)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)).replace("\n", " ") + " |" for row in rows]
    return "\n".join(lines) + "\n"


def folders_in(parent: Path) -> list[Path]:
    """The run folders in a folder, by name."""
    return sorted(folder for folder in parent.iterdir() if (folder / CONFIG).is_file())


def find_run_folders(pattern: str) -> list[Path]:
    """Run folders matched by a glob; a sweep's folder stands for the runs in it."""
    found: list[Path] = []
    for path in map(Path, sorted(glob.glob(pattern))):
        if (path / CONFIG).is_file():
            found.append(path)
        elif path.is_dir():
            found += folders_in(path)
    if not found:
        raise UserError(f"runs={pattern}: no run folder found")
    return found


def report(folders: list[Path], into: Path) -> list[dict[str, Any]]:
    """Print the table, write it ``into`` a folder as Markdown and JSON, return the rows."""
    rows = build_rows(folders, Console(stderr=True))
    print_table(rows)
    lines = verdict_lines(rows)
    for line in lines:
        print(line)
    into.mkdir(parents=True, exist_ok=True)
    text = "".join(f"\n{line}\n" for line in lines)
    write_atomically(into / "report.md", as_markdown(rows) + text)
    write_atomically(into / "report.json", json.dumps(rows, indent=1) + "\n")
    print(f"also written: {into / 'report.md'} and report.json")
    return rows
