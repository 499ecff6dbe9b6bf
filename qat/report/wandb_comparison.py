"""A study's findings as one W&B run: tables, charts, pictures, key numbers, and the saved view.

The run's id is made of the study's name, so logging and syncing a study again replaces its run. A
table's columns and the summary's keys have the same names. Left out: W&B refuses an id whose run
was deleted there; undelete it, or give the study another name.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import wandb

from qat.report import wandb_view
from qat.runs.wandb_log import mode, refusals_named
from qat.settings.schema import LoggerSettings
from qat.study.findings import Contrast, Findings, Ledger, Treatment


def _differences(name: str, contrast: Contrast | None) -> dict[str, float | None]:
    keys = {"": "mean", "_low": "low", "_high": "high", "_p_value": "p_value"}
    verdict = contrast.verdict if contrast else None
    return {name + end: getattr(verdict, key, None) for end, key in keys.items()}


def _numbers(treatment: Treatment) -> dict[str, float | None]:
    """Means over seeds; None where nothing was compared."""
    scores, sizes = treatment.val_bpb.values(), treatment.total_bytes.values()
    return {
        "val_bpb_artifact": fmean(scores) if scores else None,
        "total_bytes": fmean(sizes) if sizes else None,
        **_differences("delta_bpb", treatment.alike),
        **_differences("delta_bpb_equal_bytes", treatment.equal_bytes),
    } | {
        key: value
        for store, contrast in treatment.by_store.items()
        for key, value in _differences(f"delta_bpb_{store}", contrast).items()
    }


def _effects(ledger: Ledger) -> dict[str, float | None]:
    parts = ("throughput", "training", "gap", "total", "at_equal_steps")
    keys = {"_bpb": "mean", "_low": "low", "_high": "high"}
    return {p + end: getattr(getattr(ledger, p), key) for p in parts for end, key in keys.items()}


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    """A column per key, in order of first appearance. Nested values as JSON: a W&B column has one
    type."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[row.get(column) for column in columns] for row in rows]
    plain = [[json.dumps(v) if isinstance(v, dict | list) else v for v in line] for line in data]
    return wandb.Table(columns=[*columns], data=plain)


def _tables(findings: Findings) -> dict[str, wandb.Table]:
    treatments = [
        {"treatment": t.name, "arm": t.arm, "store": t.store, "grid": t.grid, **_numbers(t)}
        for t in findings.treatments
    ]
    ledgers: list[dict[str, Any]] = [
        {"treatment": ledger.name, "is_measured": ledger.is_measured, "basis": ledger.basis}
        | _effects(ledger)
        for ledger in findings.ledgers
    ]
    runs = [{k: v for k, v in row.items() if k != "settings"} for row in findings.rows]
    named = {"treatments": treatments, "ledgers": ledgers, "runs": runs}
    return {name: _table(rows) for name, rows in named.items() if rows}


def _charts(findings: Findings) -> dict[str, Any]:
    """W&B's own charts, drawn from tables of their own."""
    charts = {}
    if curves := [curve for curve in findings.curves if curve.seconds]:
        charts["charts/bpb_over_seconds"] = wandb.plot.line_series(
            xs=[curve.seconds for curve in curves],
            ys=[curve.bpb for curve in curves],
            keys=[curve.arm for curve in curves],
            title="training loss, bits per byte",
            xname="seconds of the clock",
        )
    stored = [{"treatment": t.name} | _numbers(t) for t in findings.treatments if t.val_bpb]
    if stored:
        charts["charts/bytes_against_bpb"] = wandb.plot.scatter(
            _table(stored),
            "total_bytes",
            "val_bpb_artifact",
            title="artifact and code, bytes, against bpb",
        )
    return charts


def _summary(findings: Findings) -> dict[str, Any]:
    return {"headline": findings.headline} | {
        f"{treatment.name}/{key}": value
        for treatment in findings.treatments
        for key, value in _numbers(treatment).items()
    }


def log_comparison(findings: Findings, folder: Path, settings: LoggerSettings) -> str:
    """Logs the findings and every picture in the study's ``folder``, writes the view, and online
    saves it too.

    Returns the line to print: where the run is and, offline, what uploads it. UserError if W&B
    refuses.
    """
    group = settings.group or findings.name
    run_id = f"comparison-{hashlib.sha256(findings.name.encode()).hexdigest()[:12]}"
    for replaced in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
        shutil.rmtree(replaced)
    config = ("question", "baseline", "seeds", "budget_seconds", "hardware", "commits", "commands")
    with (
        refusals_named(),
        wandb.init(
            project=settings.project,
            id=run_id,
            name=f"{findings.name} comparison",
            job_type="comparison",
            group=group,
            tags=settings.tags,
            config={key: getattr(findings, key) for key in config},
            dir=folder.resolve(),
            mode=mode(settings),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        ) as run,
    ):
        pictures = {
            f"pictures/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))
        }
        run.log(_tables(findings) | _charts(findings) | pictures)
        run.summary.update(_summary(findings))
    view_file = folder / wandb_view.FILE
    view = wandb_view.comparison_view(findings, group, run.entity, settings.project)
    wandb_view.describe_view(view, view_file)
    if not settings.offline:
        return f"W&B: {run.url}; arms compared: {wandb_view.save_view(view_file, run.entity)}"
    save = f"python -m qat.report.wandb_view {shlex.quote(str(view_file))}"
    return f"W&B: wandb sync {shlex.quote(run.sync_dir)}; then, for the view: {save}"
