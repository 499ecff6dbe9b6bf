"""The runs of an arm over its seeds, put together as a verdict a line."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from qat.study.significance import BAR_NATS, Verdict, bar_in_bpb, verdict

Row = dict[str, Any]


def verdict_lines(rows: Sequence[Row]) -> list[str]:
    """One for each arm that has a baseline with two seeds or more; failed seeds are named.

    Runs are of one arm if all their settings are the same but the seed. Of several with one seed
    the mean counts.
    """
    arms: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("delta_bpb") is not None:
            arms.setdefault((row["arm"], row["design"]), []).append(row)
    lines = []
    for (arm, _), compared in arms.items():
        by_seed: dict[int, list[Row]] = {}
        for row in compared:
            by_seed.setdefault(row["seed"], []).append(row)
        if len(by_seed) < 2:
            continue
        scores = [mean(r["val_bpb_artifact"] for r in runs) for runs in by_seed.values()]
        deltas = [mean(r["delta_bpb"] for r in runs) for runs in by_seed.values()]
        baselines = [score - delta for score, delta in zip(scores, deltas, strict=True)]
        bar = bar_in_bpb(compared[0]["val_bpb_artifact"], compared[0]["val_loss_artifact"])
        failed = sorted({r["seed"] for r in rows if r["arm"] == arm and r["status"] == "failed"})
        seeds = f"seeds {', '.join(map(str, sorted(by_seed)))}"
        if failed:
            seeds += f"; failed: {', '.join(map(str, failed))}"
        lines.append(f"{arm} ({seeds}): {as_line(verdict(scores, baselines, bar))}")
    return lines


def as_line(v: Verdict) -> str:
    """A verdict of two seeds or more, in words."""
    needed = "more than 1,000" if v.seeds_needed is None else f"{v.seeds_needed:,}"
    return (
        f"{v.mean:+.5f} bpb against none (95 % {v.low:+.5f} to {v.high:+.5f}; bootstrap "
        f"{v.bootstrap_low:+.5f} to {v.bootstrap_high:+.5f}), p = {v.p_value:.2g} paired, "
        f"{v.p_welch:.2g} Welch; better by more than {BAR_NATS} nats ({v.bar_bpb:.5f} bpb): "
        f"p = {v.p_over_bar:.2g}; so many seeds find {v.detectable:.5f} bpb or more, and this "
        f"difference takes {needed}"
    )
