"""The report of a cabinet: REPORT.md, summary.json and pictures, all from its rows.

Each sentence is made of numbers in ``summary.json``; a question that the rows cannot answer gets
the reason instead. What the columns mean: ``docs/metrics.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.cabinet.plots import FAMILY_COLOURS, draw
from qat.cabinet.roofline import Ceilings
from qat.cabinet.summary import FLOAT, MAX_GAP_BPB, Row, find, measured, summarise
from qat.runs.run_folder import write_atomically

# column title -> (key, format)
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
    "top-1": ("top1_accuracy", "{:.4f}"),
    "ECE": ("ece", "{:.4f}"),
    "ECE at T": ("ece_at_temperature", "{:.4f}"),
    "T": ("temperature", "{:.3f}"),
}
COSTS = {
    "latency ms": ("latency_ms", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "peak memory": ("peak_memory_bytes", "{:,}"),
}
TIERS = ("head", "mid", "tail", "all")


def write_report(
    rows: Sequence[Row], roofline: Ceilings, manifest: dict[str, Any], folder: Path
) -> None:
    """REPORT.md, summary.json and the pictures into ``folder``, which exists. ``manifest``: what
    the rows were measured on, quoted in the report. UserError if a file cannot be written."""
    summary = summarise(rows, roofline)
    pictures = draw(rows, roofline, folder)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(folder / "REPORT.md", as_markdown(rows, summary, manifest, pictures))


def as_markdown(
    rows: Sequence[Row], summary: dict[str, Any], manifest: dict[str, Any], pictures: Sequence[str]
) -> str:
    missing = len(rows) - len(measured(rows))
    parts = [
        "# Post-training quantization, variant by variant",
        f"{len(measured(rows))} variants measured, {missing} not available here.",
        "## Where to stop in production",
        stop_text(rows, summary),
        "## The frontier",
        frontier_text(rows, summary),
        "## What GPTQ buys over rounding",
        gptq_text(summary),
        "## Speed: promised and measured",
        speed_text(summary),
        "## All variants",
        f"By family, then bytes. Gap: val_bpb less that of {FLOAT}. Change of bpb by tier: *: real "
        "(the interval over documents excludes 0, and enough predictions flipped). Pairs: share of "
        "minimal pairs told right, with its interval.",
        full_table(rows, summary["frontier"]),
        "## Measured on",
        f"```json\n{json.dumps(manifest, indent=1)}\n```",
    ]
    if pictures:
        parts += ["## Pictures", "\n".join(f"![{Path(p).stem}]({p})" for p in pictures)]
    return "\n\n".join(parts) + "\n"


def stop_text(rows: Sequence[Row], summary: dict[str, Any]) -> str:
    """The rule, and the variant it leads to."""
    rule = (
        f"Rule: the smallest file with gap_bpb <= {MAX_GAP_BPB} that no other variant beats in "
        "bytes and val_bpb."
    )
    base, found = find(rows, FLOAT), summary["where_to_stop"]
    if base is None:
        return f"{rule} It cannot be applied: {_why_missing(rows, FLOAT)}, and gaps are from it."
    if found is None:
        return f"{rule} No variant on the frontier meets it."
    lines = [
        f"{rule} On this text that is {found['max_gap_nats_per_token']:.4f} nats per token.",
        f"**{found['variant']}**: {found['disk_bytes']:,} bytes, {found['times_smaller']:.2f} "
        f"times smaller than {FLOAT}, gap {found['gap_bpb']:+.5f} bpb.",
    ]
    chosen = find(rows, found["variant"])
    if chosen and chosen["tiers"]:
        tail = chosen["tiers"]["tail"]["delta_bpb"]
        real = "real" if tail["is_real"] else "not told from noise"
        lines.append(f"On rare tokens it loses {tail['estimate']:+.5f} bpb ({real}).")
    if smaller := found["next_smaller"]:
        lines.append(
            f"The next smaller on the frontier, {smaller['variant']}, saves "
            f"{smaller['bytes_saved']:,} bytes more at a gap of {smaller['gap_bpb']:+.5f} bpb."
        )
    else:
        lines.append("Nothing on the frontier is smaller.")
    return " ".join(lines)


def frontier_text(rows: Sequence[Row], summary: dict[str, Any]) -> str:
    if not summary["frontier"]:
        return "Cannot be drawn: no variant was measured."
    on_it = [row for name in summary["frontier"] if (row := find(rows, name))]
    lines = ["No other variant has both a smaller file and a lower val_bpb, smallest first:", ""]
    lines += [f"- {r['variant']}: {r['disk_bytes']:,} bytes, {r['val_bpb']:.5f} bpb" for r in on_it]
    lines += ["", "| family | least val_bpb | smallest within the gap |", "| --- | --- | --- |"]
    lines += [
        f"| {family} | {best['least_val_bpb']} | {best['smallest_within_gap'] or 'none'} |"
        for family, best in summary["best_per_family"].items()
    ]
    return "\n".join(lines)


def gptq_text(summary: dict[str, Any]) -> str:
    found = summary["gptq_over_rounding"]
    both = {grid: won for grid, won in found.items() if won}
    if not both:
        return "Cannot be said: no grid was measured both rounded (rtn_*) and with GPTQ (gptq_*)."
    lines = ["| grid | bpb bought | bytes added |", "| --- | --- | --- |"]
    for grid, won in found.items():
        cells = f"{won['bpb_bought']:+.5f} | {won['bytes_added']:+,}" if won else "None | None"
        lines.append(f"| {grid} | {cells} |")
    most = max(both, key=lambda grid: both[grid]["bpb_bought"])
    helped = sum(won["bpb_bought"] > 0 for won in both.values())
    lines += [
        "",
        f"val_bpb of rounding less that of GPTQ: GPTQ is better on {helped} of {len(both)} grids, "
        f"and buys most on {most}: {both[most]['bpb_bought']:+.5f} bpb.",
    ]
    if len(both) < len(found):
        lines.append("None: one of the two was not measured.")
    return "\n".join(lines)


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
        f"(against {FLOAT} with products in float32), and measured. The rows do not say what "
        "precision a library computes in, so each is held against all of them.",
        "",
        "| variant | " + " | ".join(f"{p}, promised" for p in reached) + " | measured | "
        "share of its float32 roof |",
        "|" + " --- |" * (len(reached) + 3),
    ]
    for name, found in speeds.items():
        promised = " | ".join(f"{times:.2f}" for times in found["promised"].values())
        share = f"{found['of_float32_roof']:.0%}"
        lines.append(f"| {name} | {promised} | {found['measured']:.2f} | {share} |")
    lines.append("")
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


def full_table(rows: Sequence[Row], on_frontier: Sequence[str]) -> str:
    families = list(FAMILY_COLOURS)
    ordered = sorted(
        rows, key=lambda row: (families.index(row["family"]), row.get("disk_bytes", math.inf))
    )
    titles = [*COLUMNS, *TIERS, "flips", "pairs", *COSTS, "note"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in ordered:
        if row["status"] == "measured":
            note = "frontier" if row["variant"] in on_frontier else ""
            cells = [*_cells(row, COLUMNS), *_tier_cells(row), _pairs(row), *_cells(row, COSTS)]
        else:
            note = f"{row['status']}: {row['reason']}".replace("|", "\\|")
            cells = [row["variant"], row["family"], *[""] * (len(titles) - 3)]
        lines.append("| " + " | ".join([*cells, note]).replace("\n", " ") + " |")
    return "\n".join(lines)


def _cells(row: Row, columns: dict[str, tuple[str, str]]) -> list[str]:
    return ["" if row[key] is None else form.format(row[key]) for key, form in columns.values()]


def _tier_cells(row: Row) -> list[str]:
    if row["tiers"] is None:
        return [""] * (len(TIERS) + 1)
    deltas = [row["tiers"][tier]["delta_bpb"] for tier in TIERS]
    cells = [f"{delta['estimate']:+.5f}{'*' if delta['is_real'] else ''}" for delta in deltas]
    return [*cells, f"{row['tiers']['all']['flipped_predictions']:,}"]


def _pairs(row: Row) -> str:
    return f"{row['pairs_accuracy']:.3f} ({row['pairs_low']:.3f} to {row['pairs_high']:.3f})"


def _why_missing(rows: Sequence[Row], variant: str) -> str:
    row = next((row for row in rows if row["variant"] == variant), None)
    return f"{variant} is unavailable ({row['reason']})" if row else f"there is no {variant}"
