"""Which rows another row beats: Pareto dominance, lower being better for every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def dominated(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[bool]:
    """For each row, whether another is nowhere higher and somewhere lower.

    Rows that are equal on all keys do not dominate each other. ``keys`` have to be numbers in
    every row.
    """
    points = [tuple(row[key] for key in keys) for row in rows]

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [any(beats(other, point) for other in points) for point in points]
