"""A study in four pictures: what the difference is made of, training, bytes, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle
from statistics import mean, stdev
from typing import Any, NamedTuple

from qat.analysis.full_report import new_figure
from qat.cabinet.plots import TICKS_BPB, label_points, scale_log
from qat.cabinet.summary import dominated
from qat.report import number_text as text
from qat.report.picture import (
    ARMS,
    BETTER,
    INK,
    LIGHT,
    MUTED,
    RULE,
    SURFACE,
    WORSE,
    Picture,
    in_style,
    wrapped,
)
from qat.study.findings import Contrast, Curve, Findings, Ledger
from qat.study.significance import BAR_NATS

PANELS_ABREAST = 3
SHOWN_FROM = 0.1  # of the clock: what comes before is steep and says nothing of the arms
STORE_MARKS = "^v<>"
WIDE = 10  # differences over so many bars are drawn as logarithms


def pictures(findings: Findings) -> list[Picture]:
    """Those that the findings have numbers for."""
    with in_style():
        drawn = [_waterfall(findings), _curves(findings), _pareto(findings), _seeds(findings)]
    return [picture for picture in drawn if picture]


def _waterfall(findings: Findings) -> Picture | None:
    ledgers = findings.ledgers
    if not ledgers:
        return None
    num_columns = min(PANELS_ABREAST, len(ledgers))
    num_rows = -(-len(ledgers) // num_columns)
    figure, all_axes = new_figure(
        3.3 * num_columns, 3.0 * num_rows, nrows=num_rows, ncols=num_columns, squeeze=False
    )
    figure.get_layout_engine().set(h_pad=0.1)
    for axes, ledger in zip(all_axes.flat, ledgers, strict=False):
        _draw_ledger(axes, ledger)
    for axes in all_axes.flat[len(ledgers) :]:
        axes.remove()
    for axes in all_axes[:, 0]:
        axes.set_ylabel("mbpb, below 0: better")
    totals = [f"{ledger.name}: total {text.ledger_mbpb(ledger)[-1]} mbpb" for ledger in ledgers]
    return Picture(
        "waterfall",
        "Each bar begins where the one before ended, so the first three add up to the total. Blue "
        "goes down (better), orange goes up (worse); whiskers are 95 % intervals over seeds. "
        "A hollow throughput bar is estimated from the loss curve, a full one measured by runs of "
        "equal steps. Each panel has its own scale. mbpb: thousandths of a bit per byte.",
        "Waterfall of throughput, training and gap. " + "; ".join(totals),
        figure,
    )


def _draw_ledger(axes: Any, ledger: Ledger) -> None:
    parts = text.ledger_parts(ledger)
    ends = list(accumulate(1000 * part.mean for part in parts))
    starts = [0.0, *ends[:-1], 0.0]
    drawn = zip((*parts, ledger.total), starts, text.ledger_mbpb(ledger), strict=True)
    for at, (part, start, number) in enumerate(drawn):
        change = 1000 * part.mean
        colour = INK if at == len(parts) else BETTER if change < 0 else WORSE
        is_hollow = at == 0 and not ledger.is_measured
        axes.bar(
            at, change, 0.62, start, edgecolor=colour, linewidth=1.2,
            color=SURFACE if is_hollow else colour,
        )  # fmt: skip
        reached = start + change
        if part.low is not None and part.high is not None:
            low, high = start + 1000 * part.low, start + 1000 * part.high
            # Beside the bar, which may be as dark.
            axes.plot([at + 0.4, at + 0.4], [low, high], color=INK, linewidth=1.2)
            reached = low if change < 0 else high
        if at < len(parts):
            axes.plot([at + 0.31, at + 0.69], [ends[at]] * 2, color=RULE, linewidth=0.8)
        axes.annotate(
            number, (at, reached), textcoords="offset points", xytext=(0, -3 if change < 0 else 3),
            ha="center", va="top" if change < 0 else "bottom", fontsize=8,
        )  # fmt: skip
    axes.axhline(0.0, color=RULE, linewidth=1)
    axes.set_xticks(range(4), ["throughput", "training", "gap", "total"], fontsize=7.5)
    axes.use_sticky_edges = False  # numbers stand beyond the bars
    axes.margins(y=0.14)
    axes.grid(axis="y")
    axes.set_title(wrapped(ledger.name))


def _curves(findings: Findings) -> Picture | None:
    curves = [curve for curve in findings.curves if curve.seconds or curve.val_seconds]
    if not any(curve.seconds for curve in curves):
        return None
    height = 0.26 * len(curves) + 0.6
    figure, (axes, ends) = new_figure(
        8.6, 4.0 + height, nrows=2, gridspec_kw={"height_ratios": [4.0, height]}
    )
    _draw_curves(axes, curves)
    for at, curve in enumerate(curves):
        colour, found = _arm_style(at)["color"], (curve.val_bpb_float, curve.val_bpb_artifact)
        if None not in found:
            ends.plot(found, [at, at], color=colour, linewidth=1.2)
        for value, face in zip(found, (SURFACE, colour), strict=True):
            if value is not None:
                ends.plot(value, at, "o", color=colour, markerfacecolor=face, markersize=6)
    for label, face in (("float weights", SURFACE), ("artifact", INK)):
        ends.plot([], [], "o", color=INK, markerfacecolor=face, label=label)
    ends.set_yticks(range(len(curves)), [wrapped(curve.arm) for curve in curves])
    ends.set_ylim(len(curves) - 0.4, -0.6)
    ends.set_xlabel("val_bpb at the end")
    ends.grid(axis="x")
    figure.legend(*ends.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return Picture(
        "curves",
        "Above: training loss, mean over seeds, with a teacher until QAT starts; dots are "
        "validation on a part of the text (eval.curve_points), of the weights that a file would "
        "hold while QAT is on, else of the float weights; a diamond marks the mean start of QAT. "
        f"The first {100 * SHOWN_FROM:.0f} % of the clock may rise out of the picture. Below: "
        "validation at "
        "the end of each arm; the line from float weights to artifact is the quantization gap.",
        "Training curves of " + ", ".join(curve.arm for curve in curves),
        figure,
    )


def _arm_style(at: int) -> dict[str, str]:
    return {
        "color": LIGHT[ARMS[at % len(ARMS)]],
        "linestyle": ("-", "--", ":")[at // len(ARMS) % 3],
    }


def _draw_curves(axes: Any, curves: Sequence[Curve]) -> None:
    from numpy import interp

    highest, lowest = 0.0, 1e9
    end = max(seconds[-1] for c in curves for seconds in (c.seconds, c.val_seconds) if seconds)
    for at, curve in enumerate(curves):
        axes.plot(
            curve.seconds, curve.bpb, linewidth=1.4, label=wrapped(curve.arm), **_arm_style(at)
        )
        if not curve.seconds:
            continue
        highest = max(highest, float(interp(SHOWN_FROM * end, curve.seconds, curve.bpb)))
        lowest = min(lowest, *curve.bpb)
    for at, curve in enumerate(curves):
        seen = [
            s if s is not None else f
            for f, s in zip(curve.val_bpb, curve.val_bpb_snapped, strict=True)
        ]
        axes.plot(
            curve.val_seconds, seen, "o", color=_arm_style(at)["color"], markersize=4,
            markeredgecolor=SURFACE,
        )  # fmt: skip
        shown = [
            bpb for t, bpb in zip(curve.val_seconds, seen, strict=True) if t >= SHOWN_FROM * end
        ]
        highest, lowest = max([highest, *shown]), min([lowest, *seen])
    if any(curve.val_seconds for curve in curves):
        axes.plot([], [], "o", color=MUTED, markersize=4, label="validation, as stored")
    for at, curve in enumerate(curves):
        if curve.switch_seconds is not None and curve.seconds:
            there = float(interp(curve.switch_seconds, curve.seconds, curve.bpb))
            axes.plot(
                curve.switch_seconds, there, "D", color=_arm_style(at)["color"], markersize=7,
                markeredgecolor=SURFACE,
            )  # fmt: skip
    if any(curve.switch_seconds is not None for curve in curves):
        axes.plot([], [], "D", color=MUTED, label="QAT starts")
    margin = 0.05 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlabel("seconds of the training clock")
    axes.set_ylabel("training loss, bits per byte")
    axes.grid(axis="y")
    axes.legend(loc="upper right")


class _File(NamedTuple):
    name: str
    is_qat: bool
    val_bpb: dict[int, float]
    total_bytes: dict[int, int]


def _files(findings: Findings) -> list[_File]:
    """What treatments are stored as, then the references among which they are not."""
    found = [
        _File(t.name, t.is_qat, t.val_bpb, t.total_bytes) for t in findings.treatments if t.val_bpb
    ]
    for treatment in findings.treatments:
        for reference in (treatment.alike, treatment.equal_bytes, *treatment.by_store.values()):
            if reference and reference.val_bpb not in [file.val_bpb for file in found]:
                of_reference = reference.val_bpb, reference.total_bytes
                found.append(_File(reference.against, False, *of_reference))
    return found


def _pareto(findings: Findings) -> Picture | None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    shown = _files(findings)
    if not shown:
        return None
    points = [(mean(f.total_bytes.values()), mean(f.val_bpb.values())) for f in shown]
    keys = ("num_bytes", "bpb")
    beaten = dominated([dict(zip(keys, point, strict=True)) for point in points], keys)
    figure, axes = new_figure(8.6, 5.2)
    line = sorted(point for point, out in zip(points, beaten, strict=True) if not out)
    axes.plot(*zip(*line, strict=True), color=RULE, linewidth=1.2, drawstyle="steps-post")
    for file, (x, y), is_beaten in zip(shown, points, beaten, strict=True):
        colour = BETTER if file.is_qat else WORSE
        axes.errorbar(
            x, y, xerr=_spread(file.total_bytes), yerr=_spread(file.val_bpb),
            fmt="o" if file.is_qat else "s", color=colour, elinewidth=1, capsize=2,
            markersize=5 if is_beaten else 7, markerfacecolor=SURFACE if is_beaten else colour,
        )  # fmt: skip
    for label, mark, colour in (("QAT", "o", BETTER), ("no QAT", "s", WORSE)):
        axes.plot([], [], mark, color=colour, label=label)
    axes.plot([], [], "o", color=MUTED, markerfacecolor=SURFACE, label="beaten by another")
    axes.plot([], [], color=RULE, label="frontier")
    axes.margins(0.12)
    for axis, set_scale, values in zip(
        (axes.xaxis, axes.yaxis), (axes.set_xscale, axes.set_yscale), zip(*points, strict=True),
        strict=True,
    ):  # fmt: skip
        if max(values) > 2 * min(values):
            scale_log(axis, set_scale)
        elif axis is axes.xaxis:
            axis.set_major_locator(MaxNLocator(6))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("bytes of artifact and code")
    axes.set_ylabel("val_bpb of the artifact")
    axes.grid()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    order = sorted(range(len(shown)), key=lambda at: beaten[at])  # the frontier gets its names
    label_points(axes, [points[at] for at in order], [shown[at].name for at in order])
    best = [file.name for file, out in zip(shown, beaten, strict=True) if not out]
    return Picture(
        "pareto",
        "Down and left is better. Treatments, and the files of the baseline that they are compared "
        "with. Each mark is a mean over seeds, its whiskers one standard deviation. The line is "
        "the frontier: no other has fewer bytes and a lower val_bpb; hollow marks are beaten by "
        "one that is no worse in either.",
        "Bytes against val_bpb. On the frontier: " + ", ".join(best),
        figure,
    )


def _spread(by_seed: dict[int, float] | dict[int, int]) -> float:
    return stdev(by_seed.values()) if len(by_seed) > 1 else 0.0


def _seeds(findings: Findings) -> Picture | None:
    compared = [(t, t.alike) for t in findings.treatments if t.alike]
    if not compared:
        return None
    stores = dict.fromkeys(store for t, _ in compared for store in t.by_store)
    marks = dict(zip(stores, cycle(STORE_MARKS), strict=False))
    ways = 2 + len(marks)
    figure, axes = new_figure(8.6, 1.4 + 0.25 * ways * len(compared))
    bars = [1000 * alike.verdict.bar_bpb for _, alike in compared]
    widest = 0.0
    for at, (treatment, alike) in enumerate(compared):
        axes.plot([-bars[at]] * 2, [at - 0.45, at + 0.45], color=INK, linewidth=1, linestyle=":")
        rows = [(alike, "o", BETTER), (treatment.equal_bytes, "D", WORSE)]
        rows += [(treatment.by_store.get(store), mark, INK) for store, mark in marks.items()]
        for place, (comparison, mark, colour) in enumerate(rows):
            if comparison:
                y = at - 0.5 + (place + 0.7) / ways
                _draw_seeds(axes, comparison, mark, colour, y, y - 0.35 / ways)
                widest = max(widest, *map(abs, comparison.by_seed.values()))
    if 1000 * widest > WIDE * max(bars):
        axes.set_xscale("asinh", linear_width=max(bars))
        low, high = axes.get_xlim()
        ticks = sorted({1000 * sign * step for sign in (-1, 1) for step in TICKS_BPB})
        shown = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(shown, [f"{tick:+g}" if tick else "0" for tick in shown])
        axes.set_xlim(low, high)
        axes.minorticks_off()
    axes.axvline(0.0, color=RULE, linewidth=1)
    axes.set_yticks(range(len(compared)), [wrapped(treatment.name) for treatment, _ in compared])
    axes.set_ylim(len(compared) - 0.45, -0.55)
    axes.set_xlabel("treatment less reference, mbpb; left of 0: the treatment is better")
    axes.grid(axis="x")
    axes.plot([], [], "o", color=BETTER, label="stored alike")
    if any(treatment.equal_bytes for treatment, _ in compared):
        axes.plot([], [], "D", color=WORSE, label="at equal bytes")
    for store, mark in marks.items():
        axes.plot([], [], mark, color=INK, label=f"beside the baseline by {store}")
    axes.plot([], [], "o", color=MUTED, markerfacecolor=SURFACE, markersize=4, label="one seed")
    axes.plot([], [], ":", color=INK, label=f"better by {BAR_NATS} nats per token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    means = [f"{t.name}: {1000 * alike.verdict.mean:+.2f} mbpb" for t, alike in compared]
    return Picture(
        "seeds",
        "Each hollow mark is one seed's difference, the full mark their mean and its line the 95 % "
        "interval. An interval that crosses the line at 0 tells no difference; one that lies left "
        "of the dotted line is better by more than the bar. mbpb: thousandths of a bit per byte.",
        "Differences by seed. Means: " + "; ".join(means),
        figure,
    )


def _draw_seeds(
    axes: Any, comparison: Contrast, mark: str, colour: str, y: float, y_of_seeds: float
) -> None:
    v = comparison.verdict
    if v.low is not None and v.high is not None:
        axes.plot([1000 * v.low, 1000 * v.high], [y, y], color=colour, linewidth=2)
    axes.plot(1000 * v.mean, y, mark, color=colour, markersize=7)
    differences = [1000 * difference for difference in comparison.by_seed.values()]
    axes.plot(
        differences, [y_of_seeds] * len(differences), mark, color=colour, markersize=4,
        markerfacecolor=SURFACE,
    )  # fmt: skip
