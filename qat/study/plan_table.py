"""The plan as people read it: which tensors live where, at how many bits, in how many bytes."""

from __future__ import annotations

import io
import re

from rich import box
from rich.console import Console
from rich.table import Table

from qat.quantize.plan import Entry, Plan

WIDTH = 100


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
        bits = f"{8 * packed / parameters:.2f}"
        table.add_row(name, storage, str(len(entries)), f"{parameters:,}", bits, f"{packed:,}")

    for (name, storage), entries in kinds.items():
        add(name, storage, entries)
    table.add_section()
    add("all", "", list(plan))
    return as_text(table)


def as_text(table: Table) -> str:
    """For logs: no colours, and the same on every terminal."""
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return text.getvalue().strip("\n")
