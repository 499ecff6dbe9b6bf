"""What the variants of a cabinet are judged by: one number of each row.

A language model's is ``val_bpb``. It is in ``manifest.json``, beside the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """``key``: of the row. ``unit``: as tables and the row's ``gap_UNIT`` say it. ``max_gap``: what
    may be lost of it where one stops in production. ``tier_change``: key of a tier's change, and
    whether it grows where things get worse is that of the objective. ``of``: what is predicted."""

    key: str
    unit: str
    max_gap: float
    higher_is_better: bool = False
    tier_change: str = ""
    of: str = "items"

    @property
    def gap_key(self) -> str:
        """Value less that of the float model: of a quality below 0 where something was lost."""
        return f"gap_{self.unit}"

    @property
    def best(self) -> str:
        return f"{'most' if self.higher_is_better else 'least'}_{self.key}"

    def cost(self, row: Mapping[str, Any]) -> float:
        """The lower the better, whatever the objective is."""
        value: float = row[self.key]
        return -value if self.higher_is_better else value

    def lost(self, row: Mapping[str, Any]) -> float:
        """Above 0: worse than the float model."""
        gap: float = row[self.gap_key]
        return -gap if self.higher_is_better else gap


BITS_PER_BYTE = Objective("val_bpb", "bpb", 0.003, False, "delta_bpb", "tokens")
