"""The cabinet in five pictures: bytes, latency, tiers, reliability, roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.analysis.full_report import new_figure
from qat.cabinet.objective import BITS_PER_BYTE, Objective, Row
from qat.cabinet.roofline import Ceilings
from qat.cabinet.summary import FLOAT, beaten_in, find, frontier, measured

FONT_SIZE = 7  # points
CHARACTER_WIDTH, LINE_HEIGHT = 0.62 * FONT_SIZE, 1.25 * FONT_SIZE
RADIUS = 4  # points, of a dot
GAP = 5  # points, from a dot's centre to its name
DISTANCES = (1, 2.5, 4, 6, 8)  # in gaps; the nearest free place is taken
DIRECTIONS = ((1, 1), (1, 0), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))

Box = tuple[float, float, float, float]  # left, bottom, right, top


# Not adjustText: of the 51 names of logs/LOG.md's cabinet it wrote 10 over others and 11 over dots.
def label_points(
    axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str | None]
) -> None:
    """Write each name beside its point, with a line to it if it had to go far; None: no name.

    Limits, scales and legend of the axes have to be final. Where all places are taken a name is
    left out rather than written over another.
    """
    axes.figure.draw_without_rendering()  # fixes the layout; a canvas of no backend does not
    to_points = 72 / axes.figure.dpi
    area = axes.get_window_extent()
    left, bottom, right, top = (to_points * edge for edge in area.extents)
    places = [tuple(to_points * xy) for xy in axes.transData.transform(points)]
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    taken.append(tuple(to_points * edge for edge in axes.get_legend().get_window_extent().extents))
    for (x, y), point, name in zip(places, points, names, strict=True):
        if name is None:
            continue
        width = CHARACTER_WIDTH * len(name)
        for distance, (dx, dy) in ((d, way) for d in DISTANCES for way in DIRECTIONS):
            start = x + dx * GAP * distance - width * (1 - dx) / 2
            base = y + dy * GAP * distance * 1.5 - LINE_HEIGHT / 2
            box = (start, base, start + width, base + LINE_HEIGHT)
            is_inside = left < box[0] and bottom < box[1] and box[2] < right and box[3] < top
            if is_inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 2}
                axes.annotate(
                    name, point, xytext=(start - x, base - y + LINE_HEIGHT / 2),
                    textcoords="offset points", va="center", fontsize=FONT_SIZE,
                    arrowprops=line if distance > 1 else None,
                )  # fmt: skip
                break


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


FAMILY_COLOURS = {  # in the order in which tables list them
    "float": "#000000", "rounding": "#4477aa", "gptq": "#cc6677", "scaled": "#228833",
    "low rank": "#aa3377", "torchao": "#66ccee", "bitsandbytes": "#997700", "qat": "#332288",
}  # fmt: skip
LINE_COLOURS = ("#4477aa", "#cc6677", "#228833", "#997700", "#aa3377", "#66ccee", "#ee7733", "grey")
LINE_STYLES = {"float32": "-", "bfloat16": "--", "int8": ":"}  # of compute ceilings
PARETO = (
    ("pareto_bytes.png", "disk_bytes", "bytes of the file"),
    ("pareto_latency.png", "latency_ms", "latency of one sequence, ms"),
)
MAX_VARIANTS = 8  # of one picture of tiers
MAX_CURVES = 4  # of the reliability diagram, beside the float model's
FINE = 0.005  # differences below this are drawn to scale, above it as logarithms
TICKS_BPB = (0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def draw(
    rows: Sequence[Row], ceilings: Ceilings, folder: Path, objective: Objective = BITS_PER_BYTE
) -> list[str]:
    """Write the pictures that the rows have numbers for; their names."""
    found = measured(rows)
    drawn = []
    if found:
        for name, key, label in PARETO:
            _pareto(rows, key, label, folder / name, objective)
            drawn.append(name)
        if any(row.get("reliability") for row in found):
            _reliability(rows, folder / "reliability.png", objective)
            drawn.append("reliability.png")
        _roofline(found, ceilings, folder / "roofline.png")
        drawn.append("roofline.png")
    if any(row["tiers"] for row in found):
        _tiers(rows, folder / "tiers.png", objective)
        drawn.append("tiers.png")
    return drawn


def spread_over(rows: Sequence[Row], most: int, objective: Objective = BITS_PER_BYTE) -> list[Row]:
    """Rows worth comparing: the frontier, thinned evenly if it has more than ``most``, then the
    best of families that are not on it."""
    line = frontier(rows, objective)
    if len(line) >= most:
        return [line[i * (len(line) - 1) // (most - 1)] for i in range(most)]
    others = sorted(measured(rows), key=objective.cost)
    for row in others:
        if len(line) < most and row["family"] not in {r["family"] for r in line}:
            line.append(row)
    return line


def _pareto(rows: Sequence[Row], key: str, label: str, path: Path, objective: Objective) -> None:
    """What is lost is drawn upwards, whatever the objective is."""
    found, base = measured(rows), find(rows, FLOAT)
    zero = objective.cost(base) if base else min(map(objective.cost, found))
    figure, axes = new_figure(9, 6)
    beaten = beaten_in(found, key, objective)
    points = [(row[key], objective.cost(row) - zero) for row in found]
    for row, point, is_beaten in zip(found, points, beaten, strict=True):
        axes.plot(
            *point, "o", color=FAMILY_COLOURS[row["family"]], markersize=5 if is_beaten else 8,
            alpha=0.4 if is_beaten else 1.0, zorder=3,
        )  # fmt: skip
    line = sorted(point for point, out in zip(points, beaten, strict=True) if not out)
    axes.plot(*zip(*line, strict=True), color="grey", linewidth=1, drawstyle="steps-post")
    scale_log(axes.xaxis, axes.set_xscale)
    shown = _scale_changes(axes)
    sign = -1 if objective.higher_is_better else 1
    named = [f"{sign * (zero + over):.3f} ({sign * over:+g})" for over in shown]
    axes.set_yticks(shown, named)
    axes.set_xlabel(label)
    worse = ", worse upwards" if objective.higher_is_better else ""
    axes.set_ylabel(f"{objective.key} (over {FLOAT if base else 'the best'}){worse}")
    _name_families(axes, found)
    axes.set_title("line: the frontier; small and pale: another is no worse in both", fontsize=9)
    order = sorted(range(len(found)), key=lambda at: beaten[at])  # the frontier gets its names
    label_points(axes, [points[at] for at in order], [found[at]["variant"] for at in order])
    figure.savefig(path)


def _name_families(axes: Any, found: Sequence[Row]) -> None:
    for family, colour in FAMILY_COLOURS.items():
        if any(row["family"] == family for row in found):
            axes.plot([], [], "o", color=colour, label=family)
    axes.legend(fontsize=8)


def scale_log(axis: Any, set_scale: Any) -> None:
    """Logarithms on an axis, few ticks; ``set_scale``: that of its axes."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _scale_changes(axes: Any) -> list[float]:
    """Differences of 8 bits and of 1 in one picture; the ticks that fit."""
    axes.set_yscale("asinh", linear_width=FINE)
    axes.margins(0.06)
    low, high = axes.get_ylim()
    ticks = sorted({sign * step for sign in (-1, 1) for step in TICKS_BPB})
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:+g}" for tick in shown])
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.3)
    return shown


def _tiers(rows: Sequence[Row], path: Path, objective: Objective) -> None:
    shown = [row for row in spread_over(rows, MAX_VARIANTS, objective) if row["tiers"]]
    if not shown:  # the float model beats all of them
        shown = sorted((row for row in measured(rows) if row["tiers"]), key=objective.cost)[:1]
    names = list(shown[0]["tiers"])
    figure, axes = new_figure(8, 5)
    for at, row in enumerate(shown):
        colour = LINE_COLOURS[at]
        for name, found in row["tiers"].items():
            x = names.index(name) + (at - (len(shown) - 1) / 2) * 0.09
            delta = found[objective.tier_change]
            if delta["low"] is not None:
                axes.plot([x, x], [delta["low"], delta["high"]], color=colour, linewidth=2)
            axes.plot(x, delta["estimate"], "o" if delta["is_real"] else "x", color=colour)
        axes.plot([], [], "o", color=colour, label=row["variant"])
    axes.axhline(0.0, color="grey", linewidth=1)
    _scale_changes(axes)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"{objective.of} by how often training saw them")
    axes.set_ylabel(f"change of {objective.tier_change.removeprefix('delta_')}")
    axes.set_title("95 % bootstrap intervals; x: not called real", fontsize=9)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)


def _reliability(rows: Sequence[Row], path: Path, objective: Objective) -> None:
    figure, axes = new_figure(5.5, 5.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    base, shown = find(rows, FLOAT), spread_over(rows, MAX_CURVES, objective)
    if base and base not in shown:
        shown = [*shown, base]
    for row, colour in zip(shown, LINE_COLOURS, strict=False):
        bins, label = row["reliability"], f"{row['variant']}: ECE {row['ece']:.4f}"
        axes.plot(
            [b["mean_confidence"] for b in bins], [b["accuracy"] for b in bins], "o-",
            color=colour, markersize=4, linewidth=1, label=label,
        )  # fmt: skip
    axes.set_xlabel(f"confidence: probability of the likeliest of the {objective.of}")
    axes.set_ylabel("accuracy: how often it was right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path)


def _roofline(found: Sequence[Row], ceilings: Ceilings, path: Path) -> None:
    figure, axes = new_figure(8, 5.5)
    points = [_roof_point(row) for row in found]
    highest = max(ceilings.flops_per_second.values())
    ridge = highest / ceilings.bytes_per_second
    low = min([0.5 * x for x, _ in points] + [0.2 * ridge])
    high = max([2 * x for x, _ in points] + [5 * ridge])
    slope = [low * ceilings.bytes_per_second, highest]
    memory = f"memory: {ceilings.bytes_per_second / 1e9:.0f} GB/s"
    axes.plot([low, ridge], slope, color="black", linewidth=1, label=memory)
    for precision, flops in ceilings.flops_per_second.items():
        label = f"{precision}: {flops / 1e9:,.0f} GFLOP/s"
        start = flops / ceilings.bytes_per_second
        style = LINE_STYLES[precision]
        axes.plot([start, high], [flops, flops], style, color="grey", linewidth=1, label=label)
    for row, point in zip(found, points, strict=True):
        axes.plot(*point, "o", color=FAMILY_COLOURS[row["family"]], markersize=5)
    scale_log(axes.xaxis, axes.set_xscale)
    scale_log(axes.yaxis, axes.set_yscale)
    axes.set_xlim(low, high)
    axes.set_xlabel("operations per byte of weights and activations")
    axes.set_ylabel("operations per second")
    _name_families(axes, found)
    in_order = sorted(found, key=lambda row: -row["latency_ms"])
    fastest = {row["family"]: row["variant"] for row in in_order}.values()
    axes.set_title("named: the fastest of its family", fontsize=9)
    names = [row["variant"] if row["variant"] in fastest else None for row in found]
    label_points(axes, points, names)
    figure.savefig(path)


def _roof_point(row: Row) -> tuple[float, float]:
    """(operations per byte, operations per second) of one sequence."""
    moved = row["weight_traffic_bytes"] + row["activation_bytes"]
    return row["flops"] / moved, row["flops"] / (row["latency_ms"] / 1000)
