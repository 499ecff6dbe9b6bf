"""Training loss over the clock, of an arm's seeds together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from qat.runs.result import Result
from qat.runs.run_folder import CURVE, METRICS, read_metrics
from qat.study.findings import Curve

POINTS = 120
SMOOTHING = 0.04  # of the run's steps: the time constant of the moving average


def curve_of(arm: str, runs: Mapping[Path, Result]) -> Curve:
    """Mean over runs (folder -> row) of the smoothed loss of their steps, in bits per byte of
    validation text: nats are converted at its tokens per byte. With a teacher it ends at the
    switch: from there on the loss is another."""
    times, losses, switches = [], [], []
    for folder, result in runs.items():
        rows = read_metrics(folder / METRICS)
        on = [float(row["elapsed_seconds"]) for row in rows if row["qat_on"] == "1"]
        switches += on[:1]
        if result.settings["qat"]["distill"]["weight"] > 0.0:
            rows = [row for row in rows if row["qat_on"] != "1"]
        if not rows or not result.val_bpb_float or not result.val_loss_float:
            continue
        bits_per_nat = result.val_bpb_float / result.val_loss_float
        loss = np.array([float(row["train_loss"]) for row in rows]) * bits_per_nat
        times.append(np.array([float(row["elapsed_seconds"]) for row in rows]))
        losses.append(_smoothed(loss))
    shared, together = np.array([]), np.array([])
    if times:
        shared = np.linspace(max(t[0] for t in times), min(t[-1] for t in times), POINTS)
        together = np.mean([np.interp(shared, t, y) for t, y in zip(times, losses, strict=True)], 0)
    return Curve(
        arm=arm,
        **validation_curve([read_metrics(f / CURVE) for f in runs if (f / CURVE).is_file()]),
        seconds=shared.tolist(),
        bpb=together.tolist(),
        switch_seconds=mean(switches) if switches else None,
        val_bpb_float=_mean(r.val_bpb_float for r in runs.values()),
        val_bpb_artifact=_mean(r.val_bpb_artifact for r in runs.values()),
    )


def _mean(scores: Iterable[float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return mean(found) if found else None


def validation_curve(of_runs: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """Means over the runs at the steps of that with fewest points, as far as all runs have some;
    between two of its points a run is on the line through them. Of snapped weights where all runs
    scored them."""
    runs = [rows for rows in of_runs if rows]
    at = _shared_steps([[float(row["step"]) for row in rows] for rows in runs])

    def mean_of(name: str) -> list[float | None]:
        values = [_read_at(at, [row for row in rows if row[name]], name) for rows in runs]
        means = np.mean(values, 0) if values else at
        return [None if math.isnan(value) else value for value in means.tolist()]

    return {
        "val_seconds": mean_of("elapsed_seconds"),
        "val_bpb": mean_of("val_bpb_float"),
        "val_bpb_snapped": mean_of("val_bpb_snapped"),
    }


def _shared_steps(of_runs: Sequence[Sequence[float]]) -> np.ndarray:
    if not of_runs:
        return np.array([])
    first, last = max(steps[0] for steps in of_runs), min(steps[-1] for steps in of_runs)
    if first > last:
        return np.array([])
    # Of equally many on a clock those of the fastest run: by then the others have switched too.
    fewest = min(of_runs, key=lambda steps: (len(steps), -steps[-1]))
    return np.unique(np.clip(fewest, first, last))


def _read_at(steps: np.ndarray, rows: Sequence[Mapping[str, str]], name: str) -> np.ndarray:
    """NaN where the rows do not reach."""
    if not rows:
        return np.full(len(steps), math.nan)
    there, values = ([float(row[key]) for row in rows] for key in ("step", name))
    return np.interp(steps, there, values, math.nan, math.nan)


def _smoothed(loss: np.ndarray) -> np.ndarray:
    """Exponential moving average, unbiased at the start."""
    keep = math.exp(-1 / max(SMOOTHING * len(loss), 1.0))
    total = weight = 0.0
    out = []
    for value in loss:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return np.array(out)
