"""Runs that share their first updates: what is equal so far is trained once.

Until its switch a QAT run is its baseline, bit for bit, where it is bounded by counting and not by
a clock. So a run may keep checkpoints (``fork.keep_steps``), and another may go on from one of them
(``fork.run``, ``fork.step``) with other settings, if not a single update before it would have
differed. The result has the bits of a run in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.runs.result import conditions, differing
from qat.runs.run_folder import kept_checkpoint, kept_steps, read_config
from qat.settings.checks import find_run
from qat.settings.schema import TrainSettings, from_yaml
from qat.text.source import absolute_paths
from qat.training.averaging import Averaging
from qat.training.build import build_schedule, gradient_of
from qat.training.checkpoint import load_checkpoint

# What may differ between runs whose updates are equal; whether it makes them differ is worked out.
APART = (
    "qat", "grid", "plan", "artifact", "limit_bytes", "optimizer.learned_scale_lr", "averaging",
    "schedule", "max_steps", "eval",
)  # fmt: skip
CODE_BYTES = "code_bytes"  # in a checkpoint: of the code that wrote it


@dataclass(frozen=True)
class Course:
    """The updates of a run, known before they are made: it has no clock."""

    conditions: dict[str, Any]
    updates: list[tuple[Any, ...]]  # of each all that makes it what it is, beside the conditions

    @staticmethod
    def of(s: TrainSettings, code_bytes: int | None = 0) -> Course:
        """``code_bytes``: counted against the limit; None if that is not known."""
        settings = asdict(s) | {"data": asdict(absolute_paths(s.data))}
        return Course(conditions(settings), list(_updates(s, code_bytes)))

    def difference(self, other: Course) -> str | None:
        """A condition that makes even the first update another, if there is one."""
        return next(iter(differing(self.conditions, other.conditions, APART)), None)

    def shared(self, other: Course) -> int:
        """How many updates both make from their first, leaving each at least one of its own."""
        if self.difference(other):
            return 0
        most = min(len(self.updates), len(other.updates)) - 1
        pairs = zip(self.updates[:most], other.updates, strict=False)
        return next((step for step, (ours, theirs) in enumerate(pairs) if ours != theirs), most)


def _updates(s: TrainSettings, code_bytes: int | None) -> Iterator[tuple[Any, ...]]:
    schedule, averaging = build_schedule(s), Averaging(**vars(s.averaging))
    rules = list(s.plan.rules)  # of which the first that fits counts
    quantization = (s.qat, s.grid, s.plan, rules, s.optimizer.learned_scale_lr)
    reads_progress = gradient_of(s.qat).anneals or s.qat.to_bytes  # which encodes half-way
    # Before the switch training to bytes learns sensitivities, whatever the limit.
    file = (s.limit_bytes, code_bytes, s.artifact.coder) if s.qat.to_bytes else None
    for step, update in enumerate(schedule.updates(), 1):
        is_seen = update.is_on or (s.qat.to_bytes and update.nears_qat)
        done = schedule.progress(step, 0.0, update.qat_steps + update.is_on)
        yield (
            update.rate,
            update.momentum,
            quantization if is_seen else None,
            file if update.is_on else None,
            (update.switched_at, update.done) if update.is_on and reads_progress else None,
            s.averaging if averaging.is_due(step, done) else None,
        )


def trunk_folder(s: TrainSettings, sweep_dir: Path | None) -> Path:
    """Of the run that this one goes on from: one beside it, or found as any run is."""
    assert s.fork.run
    if sweep_dir is not None and (sweep_dir / s.fork.run).is_dir():
        return sweep_dir / s.fork.run
    return find_run("fork.run", s.fork.run, s.runs_dir)


def scores_alike(s: TrainSettings, folder: Path) -> bool:
    """Whether points of the validation curve of the run there are such as this run makes; they may
    be more or fewer."""
    trunk = from_yaml(read_config(folder, "fork.run")[0], f"fork.run={folder}")
    ours, theirs = (replace(e, curve_points=0, max_tokens=None) for e in (s.eval, trunk.eval))
    return ours == theirs


def forked_state(s: TrainSettings, folder: Path, code_bytes: int) -> dict[str, Any]:
    """What the run in ``folder`` kept after ``fork.step`` updates.

    UserError if it kept nothing there, or has made other updates by then, perhaps because other
    ``code_bytes`` counted against its limit.
    """
    typed, step = s.fork.typed, s.fork.step
    assert step is not None
    trunk = from_yaml(read_config(folder, "fork.run")[0], f"fork.run={folder}")
    if s.budget_seconds is not None or trunk.budget_seconds is not None:
        raise UserError(f"{typed}: not with a clock; give both budget_seconds=null max_steps=N")
    ours, theirs = Course.of(s), Course.of(trunk)
    if (name := ours.difference(theirs)) is not None:
        raise UserError(f"{typed}: that run has another {name}")
    if (most := ours.shared(theirs)) < step:
        raise UserError(f"{typed}: the two runs share {most} updates; fork there or before")
    state = load_checkpoint(path := kept_checkpoint(folder, step))
    if state is None and path.exists():
        raise UserError(
            f"{typed}: {path} is damaged; run that one again, under another name, or fork at "
            "another step"
        )
    if state is None:
        kept = ", ".join(map(str, kept_steps(folder))) or "none"
        raise UserError(
            f"{typed}: no checkpoint was kept there (kept: {kept}); run that one with "
            f"fork.keep_steps=[{step}]"
        )
    counted = state.get(CODE_BYTES)
    if (most := Course.of(s, code_bytes).shared(Course.of(trunk, counted))) < step:
        raise UserError(
            f"{typed}: that run was trained to bytes beside {counted or 'unknown'} bytes of code, "
            f"and the code has {code_bytes} now; fork at step {most} or before"
        )
    return state
