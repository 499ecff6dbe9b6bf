"""Tables for a terminal or a log, as wide as they need to be: cut columns cannot be read."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def print_wide(table: Table) -> None:
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(Console().width, natural)).print(table)


WIDTH = 100


def as_text(table: Table) -> str:
    """For logs: no colours, and the same on every terminal."""
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return text.getvalue().strip("\n")
