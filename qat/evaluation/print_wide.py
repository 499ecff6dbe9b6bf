"""Tables on stdout, as wide as they need to be: cut columns cannot be read in a file either."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_wide(table: Table) -> None:
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(Console().width, natural)).print(table)
