"""What the rows of the cabinet answer, as numbers; ``summary.json`` holds them.

Every function takes the rows of ``results.json`` and computes; what the rows cannot answer is None.
Prose is in ``report.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qat.cabinet.objective import BITS_PER_BYTE, Objective, Row
from qat.cabinet.roofline import Ceilings


def dominated(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], higher: Sequence[str] = ()
) -> list[bool]:
    """For each row, whether another is nowhere higher and somewhere lower; of keys in ``higher``
    the other way round.

    Rows that are equal on all keys do not dominate each other. ``keys`` have to be numbers in
    every row.
    """
    points = [tuple(-row[key] if key in higher else row[key] for key in keys) for row in rows]

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [any(beats(other, point) for other in points) for point in points]


FLOAT = "fp32"  # the variant that others are compared with


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "measured"]


def find(rows: Sequence[Row], variant: str) -> Row | None:
    """The measured row of a variant."""
    return next((row for row in measured(rows) if row["variant"] == variant), None)


def beaten_in(rows: Sequence[Row], key: str, objective: Objective) -> list[bool]:
    """For each row, whether another has less of ``key`` and is no worse by the objective, or the
    other way round."""
    higher = (objective.key,) if objective.higher_is_better else ()
    return dominated(rows, (key, objective.key), higher)


def frontier(rows: Sequence[Row], objective: Objective = BITS_PER_BYTE) -> list[Row]:
    """Measured rows that no other beats in bytes of the file and the objective, smallest file
    first."""
    candidates = measured(rows)
    beaten = beaten_in(candidates, "disk_bytes", objective)
    on_it = [row for row, is_beaten in zip(candidates, beaten, strict=True) if not is_beaten]
    return sorted(on_it, key=lambda row: row["disk_bytes"])


def summarise(
    rows: Sequence[Row], ceilings: Ceilings, objective: Objective = BITS_PER_BYTE
) -> dict[str, Any]:
    """The content of ``summary.json``: what ``report.py`` says, as numbers."""
    return {
        "frontier": [row["variant"] for row in frontier(rows, objective)],
        "best_per_family": best_per_family(rows, objective),
        "gptq_over_rounding": gptq_over_rounding(rows, objective),
        "ceilings": vars(ceilings),
        "tier_change": objective.tier_change,
        "speed": speed(rows, ceilings),
        "where_to_stop": where_to_stop(rows, objective),
    }


def best_per_family(rows: Sequence[Row], objective: Objective) -> dict[str, dict[str, str | None]]:
    """Family -> its best variant, and its smallest file that loses no more than ``max_gap``."""
    found: dict[str, dict[str, str | None]] = {}
    for family in dict.fromkeys(row["family"] for row in measured(rows)):
        of_it = [row for row in measured(rows) if row["family"] == family]
        best = min(of_it, key=lambda row: (objective.cost(row), row["disk_bytes"]))
        near = [row for row in of_it if _is_near(rows, row, objective)]
        smallest = min(near, key=lambda row: row["disk_bytes"], default=None)
        found[family] = {
            objective.best: best["variant"],
            "smallest_within_gap": smallest["variant"] if smallest else None,
        }
    return found


def _is_near(rows: Sequence[Row], row: Row, objective: Objective) -> bool:
    return find(rows, FLOAT) is not None and objective.lost(row) <= objective.max_gap


def gptq_over_rounding(
    rows: Sequence[Row], objective: Objective
) -> dict[str, dict[str, float] | None]:
    """Grid -> what ``gptq_GRID`` has over ``rtn_GRID``, of grids with both rows; None where one
    was not measured.

    ``UNIT_bought``: of the objective, what rounding loses and GPTQ does not. ``bytes_added``: of
    the file.
    """
    names = {row["variant"] for row in rows}
    tuned_grids = [name.removeprefix("gptq_") for name in names if name.startswith("gptq_")]
    grids = sorted(grid for grid in tuned_grids if f"rtn_{grid}" in names)
    found: dict[str, dict[str, float] | None] = {}
    for grid in grids:
        rounded, tuned = find(rows, f"rtn_{grid}"), find(rows, f"gptq_{grid}")
        found[grid] = rounded and tuned and {
            f"{objective.unit}_bought": objective.cost(rounded) - objective.cost(tuned),
            "bytes_added": tuned["disk_bytes"] - rounded["disk_bytes"],
        }  # fmt: skip
    return found


def roof_seconds(row: Row, ceilings: Ceilings, precision: str) -> float:
    """No forward pass of one sequence is faster, with products in ``precision``."""
    moved = row["weight_traffic_bytes"] + row["activation_bytes"]
    computing = row["flops"] / ceilings.flops_per_second[precision]
    return max(computing, moved / ceilings.bytes_per_second)


def speed(rows: Sequence[Row], ceilings: Ceilings) -> dict[str, dict[str, Any]]:
    """Variant -> what the roofline promises and what was measured.

    ``promised``: precision of the products -> how many times as fast as the roof of fp32 with
    products in float32; None without fp32. ``measured``: of latencies in turn with fp32's, which
    in three quarters of the pairs was ``at_least``.
    ``of_float32_roof``: measured speed over that of the row's own roof with products in float32.
    ``is_compute_bound``: this roof is that of arithmetic.
    """
    base = find(rows, FLOAT)
    found = {}
    for row in measured(rows):
        seconds = row["latency_ms"] / 1000
        roofs = {p: roof_seconds(row, ceilings, p) for p in ceilings.flops_per_second}
        base_roof = base and roof_seconds(base, ceilings, "float32")
        found[row["variant"]] = {
            "promised": base_roof and {p: base_roof / roof for p, roof in roofs.items()},
            "measured": row["latency_speedup"],
            "at_least": row["latency_speedup_low"],
            "of_float32_roof": roofs["float32"] / seconds,
            "is_compute_bound": row["flops"] / ceilings.flops_per_second["float32"]
            >= roofs["float32"],
        }
    return found


def where_to_stop(rows: Sequence[Row], objective: Objective) -> dict[str, Any] | None:
    """The smallest file on the frontier that loses ``max_gap`` at most, and what the next smaller
    one on the frontier would save and cost. None without fp32."""
    base = find(rows, FLOAT)
    if base is None:
        return None
    line = frontier(rows, objective)
    chosen = next((row for row in line if _is_near(rows, row, objective)), None)
    if chosen is None:
        return None
    smaller = line[line.index(chosen) - 1] if chosen is not line[0] else None
    found = {
        "variant": chosen["variant"],
        "disk_bytes": chosen["disk_bytes"],
        objective.gap_key: chosen[objective.gap_key],
        "times_smaller": base["disk_bytes"] / chosen["disk_bytes"],
        f"max_{objective.gap_key}": objective.max_gap,
        "next_smaller": smaller and {
            "variant": smaller["variant"],
            "bytes_saved": chosen["disk_bytes"] - smaller["disk_bytes"],
            objective.gap_key: smaller[objective.gap_key],
        },
    }  # fmt: skip
    if objective == BITS_PER_BYTE:
        bytes_per_token = base["val_loss"] / (math.log(2) * base["val_bpb"])
        found["max_gap_nats_per_token"] = objective.max_gap * math.log(2) * bytes_per_token
    return found
