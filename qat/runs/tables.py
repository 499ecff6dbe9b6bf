"""A run as people read it: its plan, tensor by tensor, and its row beside its baseline's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qat.quantize.plan import Entry, Plan
from qat.settings.terminal import as_text, print_wide


def plan_table(plan: Plan) -> str:
    """One line per kind of tensor (block numbers become ``*``) and storage, and the sum."""
    kinds: dict[tuple[str, str], list[Entry]] = {}
    for entry in plan:
        storage = entry.dtype if entry.grid is None else entry.grid.label
        kinds.setdefault((re.sub(r"\d+", "*", entry.name, count=1), storage), []).append(entry)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("tensor", "stored as", "tensors", "parameters", "bits each", "packed bytes"):
        table.add_column(title, justify="left" if title in ("tensor", "stored as") else "right")

    def add(name: str, storage: str, entries: list[Entry]) -> None:
        parameters = sum(entry.num_elements for entry in entries)
        packed = sum(entry.packed_bytes for entry in entries)
        bits = f"{8 * packed / parameters:.2f}" if parameters else ""
        table.add_row(name, storage, str(len(entries)), f"{parameters:,}", bits, f"{packed:,}")

    for (name, storage), entries in kinds.items():
        add(name, storage, entries)
    table.add_section()
    add("all", "", list(plan))
    return as_text(table)


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


TEXTS = ("arm", "run", "note")  # the other columns are numbers


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A run's row as people read it: column title -> cell, "" for what was not measured."""
    return {
        title: "" if row.get(key) is None else form.format(row[key])
        for title, (key, form) in COLUMNS.items()
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """On stdout, as wide as it needs to be."""
    table = Table(title="QAT against its no-QAT baseline", title_justify="left")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in TEXTS else "right")
    for row in rows:
        bad = row["status"] != "finished" or row.get("qat_never_started")
        table.add_row(*cells(row).values(), style="red" if bad else None)
    print_wide(table)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    return markdown_table(COLUMNS, [[*cells(row).values()] for row in rows]) + "\n"


def markdown_table(
    titles: Iterable[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()
) -> str:
    """Columns whose title is in ``numbers`` stand on the right."""
    titles = [*titles]
    lines = [titles, ["---:" if title in numbers else "---" for title in titles], *rows]
    return "\n".join(f"| {' | '.join(map(_as_cell, line))} |" for line in lines)


def _as_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
