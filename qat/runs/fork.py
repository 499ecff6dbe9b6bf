"""Runs that share their first updates: what is equal so far is trained once.

Until its switch a QAT run is its baseline, bit for bit, where it is bounded by counting and not by a
clock. So a run may keep checkpoints (``fork.keep_steps``), and another may go on from one of them
(``fork.run``, ``fork.step``) with other settings, if not a single update before it would have
differed. The result has the bits of a run in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.runs.result import conditions, differing
from qat.runs.run_folder import kept_checkpoint, kept_steps, read_config
from qat.settings.checks import find_run
from qat.settings.schema import TrainSettings, from_yaml
from qat.text.source import absolute_paths
from qat.training.averaging import Averaging
from qat.training.build import build_schedule
from qat.training.checkpoint import load_checkpoint

# What may differ between runs of equal updates; that it does not differ too early is counted out.
APART = (
    "qat", "grid", "plan", "artifact", "limit_bytes", "optimizer.learned_scale_lr", "averaging",
    "schedule", "max_steps", "eval",
)  # fmt: skip


def updates(s: TrainSettings) -> Iterator[tuple[Any, ...]]:
    """Every update of a run without a clock: all that makes it what it is, beside the data and the
    settings not ``APART``."""
    schedule, averaging = build_schedule(s), Averaging(**vars(s.averaging))
    quantization = (s.qat, s.grid, s.plan, s.optimizer.learned_scale_lr)
    for step, update in enumerate(schedule.updates(), 1):
        is_seen = update.is_on or (s.qat.to_bytes and update.nears_qat)
        done = schedule.progress(step, 0.0, update.qat_steps + update.is_on)
        yield (
            update.rate,
            update.momentum,
            quantization if is_seen else None,
            s.averaging if averaging.is_due(step, done) else None,
        )


def shared_updates(one: TrainSettings, other: TrainSettings) -> int:
    """How many updates the runs share from their first, leaving each at least one of its own.

    0 for a run with a clock: nobody knows its updates before it has ended.
    """
    if one.budget_seconds is not None or other.budget_seconds is not None:
        return 0
    if differing(_conditions(one), _conditions(other), APART):
        return 0
    shared = 0
    for ours, theirs in zip(updates(one), updates(other), strict=False):
        if ours != theirs:
            return shared
        shared += 1
    return max(shared - 1, 0)


def _conditions(s: TrainSettings) -> dict[str, Any]:
    return conditions(asdict(s) | {"data": asdict(absolute_paths(s.data))})


def fork_folder(s: TrainSettings, sweep_dir: Path | None) -> Path:
    """Of the run that this one goes on from."""
    assert s.fork.run
    beside = sweep_dir / s.fork.run if sweep_dir is not None else None
    if beside is not None and beside.is_dir():
        return beside
    return find_run("fork.run", s.fork.run, s.runs_dir)


def forked_state(s: TrainSettings, folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` kept after ``fork.step`` updates.

    UserError if it kept nothing there, or is another run by then.
    """
    typed, step = f"fork.run={s.fork.run} fork.step={s.fork.step}", s.fork.step
    assert step is not None
    trunk = from_yaml(read_config(folder, "fork.run")[0], f"fork.run={folder}")
    if s.budget_seconds is not None:
        raise UserError(f"{typed}: not with a clock; give budget_seconds=null max_steps=N")
    if names := differing(_conditions(trunk), _conditions(s), APART):
        raise UserError(f"{typed}: that run has another {names[0]}")
    if (most := shared_updates(trunk, s)) < step:
        raise UserError(f"{typed}: the two runs share {most} updates; fork there or before")
    state = load_checkpoint(kept_checkpoint(folder, step))
    if state is None:
        kept = ", ".join(map(str, kept_steps(folder))) or "none"
        raise UserError(
            f"{typed}: no checkpoint was kept there (kept: {kept}); run it with "
            f"fork.keep_steps=[{step}]"
        )
    return state
