"""What one artifact may weigh: the only place that knows when a file fits and when it is full."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW = 0.999  # least share of a budget that counts as filled


@dataclass(frozen=True)
class Budget:
    """``limit_bytes`` for artifact and code together, decimal; ``code_bytes`` of the code."""

    limit_bytes: int
    code_bytes: int = 0

    @property
    def artifact_bytes(self) -> int:
        """Bytes that the code leaves to the file; below 1 if it leaves none."""
        return self.limit_bytes - self.code_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest file that counts as filling the budget."""
        return math.ceil(WINDOW * self.artifact_bytes)

    @property
    def aim_bytes(self) -> float:
        """The middle of the window."""
        return (1 + WINDOW) / 2 * self.artifact_bytes

    def holds(self, num_bytes: float) -> bool:
        return num_bytes <= self.artifact_bytes

    def is_filled_by(self, num_bytes: float) -> bool:
        return self.least_bytes <= num_bytes <= self.artifact_bytes
