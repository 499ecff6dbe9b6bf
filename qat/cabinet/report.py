"""The report of a cabinet: REPORT.md, summary.json and pictures, all from its rows.

Each sentence is made of numbers in ``summary.json``; a question that the rows cannot answer gets
the reason instead. What the columns mean: ``docs/metrics.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qat.analysis.intervals import MIN_FLIPS
from qat.cabinet.objective import BITS_PER_BYTE, Objective, Row
from qat.cabinet.plots import FAMILY_COLOURS, draw
from qat.cabinet.roofline import Ceilings
from qat.cabinet.summary import FLOAT, find, measured, summarise
from qat.runs.run_folder import write_atomically
from qat.runs.tables import markdown_table

# column title -> (key, format); those that no row has are left out
COLUMNS = {
    "variant": ("variant", "{}"),
    "family": ("family", "{}"),
    "disk bytes": ("disk_bytes", "{:,}"),
    "memory bytes": ("memory_bytes", "{:,}"),
    "embedding": ("embedding", "{}"),
    "val_bpb": ("val_bpb", "{:.5f}"),
    "gap": ("gap_bpb", "{:+.5f}"),
    "val_loss": ("val_loss", "{:.5f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "macro F1": ("macro_f1", "{:.4f}"),
    "gap of F1": ("gap_macro_f1", "{:+.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "MCC": ("mcc", "{:.4f}"),
    "AUC": ("auc", "{:.4f}"),
    "kappa": ("kappa", "{:.4f}"),
    "top-1": ("top1_accuracy", "{:.4f}"),
    "ECE": ("ece", "{:.4f}"),
    "ECE at T": ("ece_at_temperature", "{:.4f}"),
    "T": ("temperature", "{:.3f}"),
}
COSTS = {
    "latency ms": ("latency_ms", "{:.2f}"),
    "x fp32": ("latency_speedup", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "items/s": ("items_per_second", "{:,.0f}"),
    "x fp32 in batches": ("throughput_speedup", "{:.2f}"),
    "peak memory": ("peak_memory_bytes", "{:,}"),
}
FASTER = 1.05  # times the speed of fp32
TIERS = ("head", "mid", "tail", "all")
_TIERS_SAID = (
    " By tier: {}, *: real (its bootstrap interval excludes 0, and enough predictions flipped)."
)
# keys of rows that are no columns of their own
NOT_SHOWN = {
    "variant", "family", "status", "reason", "make_seconds", "tiers", "reliability", "embedding",
    "precision", "flops", "activation_bytes", "weight_traffic_bytes", "pairs_accuracy",
    "pairs_low", "pairs_high", "flipped_predictions", "latency_speedup_low",
    "throughput_speedup_low",
}  # fmt: skip


def write_report(
    rows: Sequence[Row],
    roofline: Ceilings,
    manifest: dict[str, Any],
    folder: Path,
    objective: Objective = BITS_PER_BYTE,
) -> None:
    """REPORT.md, summary.json and the pictures into ``folder``, which exists. ``manifest``: what
    the rows were measured on, quoted in the report. UserError if a file cannot be written."""
    summary = summarise(rows, roofline, objective)
    pictures = draw(rows, roofline, folder, objective)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(
        folder / "REPORT.md", as_markdown(rows, summary, manifest, pictures, objective)
    )


def as_markdown(
    rows: Sequence[Row],
    summary: dict[str, Any],
    manifest: dict[str, Any],
    pictures: Sequence[str],
    objective: Objective = BITS_PER_BYTE,
) -> str:
    has_tiers = any(row["tiers"] for row in measured(rows))
    has_pairs = any("pairs_accuracy" in row for row in measured(rows))
    missing = len(rows) - len(measured(rows))
    parts = [
        "# Post-training quantization, variant by variant",
        f"{len(measured(rows))} variants measured, {missing} not available here.",
        "## Where to stop in production",
        stop_text(rows, summary, objective),
        "## Promises",
        promises_text(rows, summary),
        "## The frontier",
        frontier_text(rows, summary, objective),
        "## What GPTQ buys over rounding",
        gptq_text(summary, objective),
        *(["## What QAT buys", qat_text(rows, objective)] if _qat_grids(rows) else []),
        *(["## Where damage lands", tiers_text(rows, objective)] if has_tiers else []),
        *(["## Temperature", temperature_text(rows)] if _with_temperature(rows) else []),
        "## Speed: promised and measured",
        speed_text(summary),
        "## All variants",
        f"By family, then bytes. Gap: {objective.key} less that of {FLOAT}."
        + (_TIERS_SAID.format(objective.tier_change) if has_tiers else "")
        + (" Pairs: share of minimal pairs told right, with its interval." if has_pairs else ""),
        full_table(rows, summary["frontier"], objective),
        "## Measured on",
        f"```json\n{json.dumps(manifest, indent=1)}\n```",
    ]
    if pictures:
        parts += ["## Pictures", "\n".join(f"![{Path(p).stem}]({p})" for p in pictures)]
    return "\n\n".join(parts) + "\n"


def stop_text(
    rows: Sequence[Row], summary: dict[str, Any], objective: Objective = BITS_PER_BYTE
) -> str:
    """The rule, and the variant it leads to."""
    rule = (
        f"Rule: the smallest file with {objective.gap_key} "
        f"{'>= -' if objective.higher_is_better else '<= '}{objective.max_gap} that no other "
        f"variant beats in bytes and {objective.key}."
    )
    base, found = find(rows, FLOAT), summary["where_to_stop"]
    if base is None:
        return f"{rule} It cannot be applied: {_why_missing(rows, FLOAT)}, and gaps are from it."
    if found is None:
        return f"{rule} No variant on the frontier meets it."
    in_nats = found.get("max_gap_nats_per_token")
    lines = [
        rule + (f" On this text that is {in_nats:.4f} nats per token." if in_nats else ""),
        f"**{found['variant']}**: {found['disk_bytes']:,} bytes, {found['times_smaller']:.2f} "
        f"times smaller than {FLOAT}, gap {found[objective.gap_key]:+.5f} {objective.unit}.",
    ]
    chosen = find(rows, found["variant"])
    if chosen and (tail := (chosen["tiers"] or {}).get("tail")):
        change = tail[objective.tier_change]
        real = "real" if change["is_real"] else "not told from noise"
        lost = change["estimate"] * (-1 if objective.higher_is_better else 1)
        lines.append(
            f"On rare {objective.of} it loses {lost:+.5f} "
            f"{objective.tier_change.removeprefix('delta_')} ({real})."
        )
    if smaller := found["next_smaller"]:
        lines.append(
            f"The next smaller on the frontier, {smaller['variant']}, saves "
            f"{smaller['bytes_saved']:,} bytes more at a gap of "
            f"{smaller[objective.gap_key]:+.5f} {objective.unit}."
        )
    else:
        lines.append("Nothing on the frontier is smaller.")
    return " ".join(lines)


def promises_text(rows: Sequence[Row], summary: dict[str, Any]) -> str:
    """What storing in fewer bits promises, and which variants keep it: as good, smaller, faster."""
    base = find(rows, FLOAT)
    others = [row for row in measured(rows) if row is not base]
    if base is None or not others:
        return f"Cannot be said: it takes {FLOAT} and another variant."
    speeds = summary["speed"]
    damaged = [
        row["variant"] for row in others
        if row["tiers"] and any(
            change["is_real"] for tier in row["tiers"].values()
            for key, change in tier.items() if key == summary["tier_change"]
        )
    ]  # fmt: skip
    small = [row["variant"] for row in others if row["memory_bytes"] < base["memory_bytes"]]
    fast = [r["variant"] for r in others if speeds[r["variant"]]["at_least"] >= FASTER]
    smallest = min(others, key=lambda row: row["memory_bytes"])
    times = base["memory_bytes"] / smallest["memory_bytes"]
    told = {
        "As good: no tier with a real change": [
            row["variant"] for row in others if row["tiers"] and row["variant"] not in damaged
        ],
        f"Smaller in memory than {FLOAT} ({smallest['variant']}: {times:.2f} times)": small,
        f"Faster, {FASTER} times at least in three of four timings in turn with {FLOAT}": fast,
    }
    return "\n".join(
        f"- {what}: {len(names)} of {len(others)}" + (f" ({', '.join(names)})." if names else ".")
        for what, names in told.items()
    )


def frontier_text(rows: Sequence[Row], summary: dict[str, Any], objective: Objective) -> str:
    if not summary["frontier"]:
        return "Cannot be drawn: no variant was measured."
    on_it = [row for name in summary["frontier"] if (row := find(rows, name))]
    better = "higher" if objective.higher_is_better else "lower"
    lines = [
        f"No other variant has both a smaller file and a {better} {objective.key}, smallest first:",
        "",
    ]
    lines += [
        f"- {r['variant']}: {r['disk_bytes']:,} bytes, {r[objective.key]:.5f} {objective.unit}"
        for r in on_it
    ]
    best = [
        [family, str(found[objective.best]), found["smallest_within_gap"] or "none"]
        for family, found in summary["best_per_family"].items()
    ]
    titles = ("family", objective.best.replace("_", " ", 1), "smallest within the gap")
    return "\n".join([*lines, "", markdown_table(titles, best)])


def gptq_text(summary: dict[str, Any], objective: Objective) -> str:
    bought, unit = f"{objective.unit}_bought", objective.unit
    found = summary["gptq_over_rounding"]
    both = {grid: won for grid, won in found.items() if won}
    if not both:
        return "Cannot be said: no grid was measured both rounded (rtn_*) and with GPTQ (gptq_*)."
    rows = [
        [grid, *((f"{won[bought]:+.5f}", f"{won['bytes_added']:+,}") if won else ("None", "None"))]
        for grid, won in found.items()
    ]
    lines = [markdown_table(("grid", f"{unit} bought", "bytes added"), rows)]
    most = max(both, key=lambda grid: both[grid][bought])
    helped = sum(won[bought] > 0 for won in both.values())
    lines += [
        "",
        f"{objective.key}, what GPTQ loses less than rounding: GPTQ is better on {helped} of "
        f"{len(both)} grids, and buys most on {most}: {both[most][bought]:+.5f} {unit}.",
    ]
    if len(both) < len(found):
        lines.append("None: one of the two was not measured.")
    return "\n".join(lines)


def _qat_grids(rows: Sequence[Row]) -> list[str]:
    """Of rows ``qat_GRID``: files of models that were trained on with their grid."""
    return [r["variant"].removeprefix("qat_") for r in measured(rows) if r["family"] == "qat"]


def qat_text(rows: Sequence[Row], objective: Objective) -> str:
    table = []
    for grid in _qat_grids(rows):
        found = [find(rows, name) for name in (f"rtn_{grid}", f"gptq_{grid}", f"qat_{grid}")]
        cells = [
            f"{row[objective.gap_key]:+.5f} ({row['disk_bytes']:,})" if row else "" for row in found
        ]
        table.append([grid, *cells])
    lines = [
        f"{objective.gap_key}, and in brackets bytes of the file. QAT's weights are others: it "
        "went on training.",
        "",
        markdown_table(("grid", "rounded", "GPTQ", "QAT"), table),
        "",
    ]
    for grid in _qat_grids(rows):
        if said := _saved(grid, rows, objective):
            lines.append(f"- {grid}: {said}")
    return "\n".join(lines)


def _saved(grid: str, rows: Sequence[Row], objective: Objective) -> str | None:
    """Whether QAT kept what rounding loses; None where it was not measured by text."""
    found = [find(rows, f"{way}_{grid}") for way in ("rtn", "gptq", "qat")]
    rounded, by_gptq, by_qat = [
        row and (row["tiers"] or {}).get("all", {}).get(objective.tier_change) for row in found
    ]
    if not (rounded and by_qat):
        return None
    if not rounded["is_real"]:
        return "rounding lost nothing that is told from noise, so there was nothing to save."
    told = {"QAT": by_qat, "GPTQ": by_gptq}
    return (
        f"rounding changed it by {rounded['estimate']:+.4f}; "
        + "; ".join(
            f"{way} {change['estimate']:+.4f}"
            + (" (real)" if change["is_real"] else " (not told from noise)")
            for way, change in told.items()
            if change
        )
        + "."
    )


def tiers_text(rows: Sequence[Row], objective: Objective) -> str:
    """Both halves of what is called real, for every variant: the interval, and the flips."""
    table = []
    for row in measured(rows):
        if not row["tiers"]:
            continue
        cells, real = [], []
        for tier in TIERS:
            found = row["tiers"].get(tier)
            if found is None:
                cells.append("")
                continue
            change = found[objective.tier_change]
            bounds = (
                "no interval"
                if change["low"] is None
                else f"{change['low']:+.4f} to {change['high']:+.4f}"
            )
            flips = found["flipped_predictions"]
            cells.append(f"{change['estimate']:+.4f} ({bounds}), {flips:,} flips")
            real += [tier] if change["is_real"] else []
        table.append([row["variant"], *cells, ", ".join(real) or "none"])
    return (
        f"{objective.tier_change}, its 95 % interval, and how many predictions flipped. Real: the "
        f"interval excludes 0, and {MIN_FLIPS} predictions flipped at least.\n\n"
        + markdown_table(("variant", *TIERS, "real in"), table)
    )


def _with_temperature(rows: Sequence[Row]) -> list[Row]:
    return [row for row in measured(rows) if row.get("ece_at_temperature") is not None]


def temperature_text(rows: Sequence[Row]) -> str:
    """Does a temperature that was found on one half mend the other?"""
    found = _with_temperature(rows)
    helped = sum(row["ece_at_temperature"] < row["ece"] for row in found)
    changes = sorted(row["ece_at_temperature"] - row["ece"] for row in found)
    lines = [
        "Fitted on one half by least loss, judged on the other half. It makes the expected "
        f"calibration error smaller for {helped} of {len(found)} variants: the change is "
        f"{changes[len(changes) // 2]:+.4f} in the middle, {changes[0]:+.4f} at best and "
        f"{changes[-1]:+.4f} at worst.",
    ]
    if all("nats" in row for row in found):
        better = sum(row["nats_at_temperature"] < row["nats"] for row in found)
        lines.append(f"It makes the loss there smaller for {better} of {len(found)}.")
    return " ".join(lines)


def speed_text(summary: dict[str, Any]) -> str:
    ceilings, speeds = summary["ceilings"], summary["speed"]
    reached = ceilings["flops_per_second"]
    numbers = [f"{p} {flops / 1e9:,.0f} GFLOP/s" for p, flops in reached.items()]
    numbers += [f"{p} none ({reason})" for p, reason in ceilings["missing"].items()]
    lines = [
        f"This machine reaches {ceilings['bytes_per_second'] / 1e9:.1f} GB/s and in products: "
        + ", ".join(numbers) + ".",
    ]  # fmt: skip
    if not speeds:
        return "\n".join([*lines, "No variant was measured."])
    if FLOAT not in speeds:
        return "\n".join([*lines, f"No speed-up can be said: {FLOAT} was not measured."])
    lines += [
        f"Times the speed of {FLOAT}: promised by the roofline if products run in that precision "
        f"(against {FLOAT} with products in float32), and measured in turn with it. The rows do "
        "not say what precision a library computes in, so each is held against all of them.",
        "",
        markdown_table(
            ("variant", *(f"{p}, promised" for p in reached), "measured",
             "share of its float32 roof"),
            [
                [name, *(f"{times:.2f}" for times in found["promised"].values()),
                 f"{found['measured']:.2f}", f"{found['of_float32_roof']:.0%}"]
                for name, found in speeds.items()
            ],
        ),
        "",
    ]  # fmt: skip
    for precision in reached:
        best = max(speeds, key=lambda name: _promised_then_measured(speeds[name], precision))
        lines.append(
            f"- {precision}: at most {speeds[best]['promised'][precision]:.2f} times promised "
            f"({best}), which was measured at {speeds[best]['measured']:.2f} times."
        )
    computing = [name for name, found in speeds.items() if found["is_compute_bound"]]
    lines.append(
        f"- With products in float32, arithmetic and not memory is the roof of {len(computing)} of "
        f"{len(speeds)} variants: to these, fewer bytes promise nothing."
    )
    fastest = max(speeds, key=lambda name: speeds[name]["measured"])
    lines.append(f"- Fastest measured: {fastest}, {speeds[fastest]['measured']:.2f} times.")
    return "\n".join(lines)


def _promised_then_measured(found: dict[str, Any], precision: str) -> tuple[float, float]:
    return found["promised"][precision], found["measured"]


def full_table(
    rows: Sequence[Row], on_frontier: Sequence[str], objective: Objective = BITS_PER_BYTE
) -> str:
    families = list(FAMILY_COLOURS)
    ordered = sorted(
        rows, key=lambda row: (families.index(row["family"]), row.get("disk_bytes", math.inf))
    )
    columns = _columns(rows, objective)
    titles = [*columns, "note"]
    table = []
    for row in ordered:
        if row["status"] == "measured":
            note = "frontier" if row["variant"] in on_frontier else ""
            cells = [cell(row) for cell in columns.values()]
        else:
            note = f"{row['status']}: {row['reason']}"
            cells = [row["variant"], row["family"], *[""] * (len(titles) - 3)]
        table.append([*cells, note])
    return markdown_table(titles, table)


def _columns(rows: Sequence[Row], objective: Objective) -> dict[str, Callable[[Row], str]]:
    """Title -> what writes its cell: the known ones that a row has, then what else was measured."""
    keys = {key: None for row in measured(rows) for key in row}  # in their order
    all_of_it = {key for key, _ in (*COLUMNS.values(), *COSTS.values())} | NOT_SHOWN
    more = {
        key: (key, "{:.5g}")
        for key in keys
        if key not in all_of_it and all(_is_number(row.get(key, 0.0)) for row in measured(rows))
    }
    columns = _cells(COLUMNS | more, keys)
    if any(row["tiers"] for row in measured(rows)):
        columns |= {tier: partial(_tier, tier, objective) for tier in TIERS}
        columns["flips"] = _flips
    if "pairs_accuracy" in keys:
        columns["pairs"] = _pairs
    return columns | _cells(COSTS, keys)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cells(
    columns: Mapping[str, tuple[str, str]], keys: Collection[str]
) -> dict[str, Callable[[Row], str]]:
    def write(key: str, form: str, row: Row) -> str:
        return "" if row.get(key) is None else form.format(row[key])

    always = ("variant", "family")
    return {
        title: partial(write, key, form)
        for title, (key, form) in columns.items()
        if key in keys or key in always
    }


def _tier(tier: str, objective: Objective, row: Row) -> str:
    found = (row["tiers"] or {}).get(tier)
    if found is None or (change := found[objective.tier_change])["estimate"] is None:
        return ""
    return f"{change['estimate']:+.5f}{'*' if change['is_real'] else ''}"


def _flips(row: Row) -> str:
    return f"{row['tiers']['all']['flipped_predictions']:,}" if row["tiers"] else ""


def _pairs(row: Row) -> str:
    return f"{row['pairs_accuracy']:.3f} ({row['pairs_low']:.3f} to {row['pairs_high']:.3f})"


def _why_missing(rows: Sequence[Row], variant: str) -> str:
    row = next((row for row in rows if row["variant"] == variant), None)
    return f"{variant} is unavailable ({row['reason']})" if row else f"there is no {variant}"
