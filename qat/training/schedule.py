"""What the clock decides: rate, momentum, QAT switch, stop. Pure functions of (step, time).

``step`` counts finished updates from 0, ``qat_steps`` those of them with QAT on;
``elapsed_seconds`` is the agreed clock before the update.

On a priced clock there are no seconds: an update costs ``update_price``, with QAT on
``qat_update_price``, and the run may spend ``max_steps``. So runs whose updates take longer get
fewer of them, and everything is decided by counting: the same bits on any machine and day.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

OBSERVED_STEPS = 64  # before the switch: what training to bytes learns the sensitivities from


class Update(NamedTuple):
    """What the schedule says of one update."""

    rate: float
    momentum: float
    qat_steps: int  # before it
    is_on: bool  # QAT
    nears_qat: bool
    done: float  # share of the run that is over before it
    switched_at: float | None  # that share at the switch


@dataclass(frozen=True)
class Schedule:
    """All three starts None mean QAT is never switched on."""

    budget_seconds: float | None
    max_steps: int | None
    warmdown_steps: int | None
    momentum_start: float
    momentum_end: float
    momentum_warmup_steps: int
    start_step: int | None = None
    start_fraction: float | None = None
    start_lr_scale: float | None = None
    stop_step: int | None = None
    ramp_steps: int = 0
    warmdown_fraction: float | None = None
    floor: float = 0.0
    update_price: float = 1.0
    qat_update_price: float = 1.0

    def spent(self, step: int, qat_steps: int) -> float:
        """Of ``max_steps``."""
        without = step - qat_steps
        return self.update_price * without + self.qat_update_price * qat_steps

    def rate(self, step: int, elapsed_seconds: float, qat_steps: int = 0) -> float:
        """Multiplier of every learning rate: 1, then falling linearly to ``floor`` at the end.

        Over the last ``warmdown_fraction`` of the run; or by steps, over the last
        ``warmdown_steps``; or by time, over as many seconds as that many steps take at the speed
        measured so far (the baseline's rule; with more steps than the run has, the rate decays
        from the start). With both limits set the lower rate holds.
        """
        return self.floor + (1.0 - self.floor) * self._warmdown(step, elapsed_seconds, qat_steps)

    def _warmdown(self, step: int, elapsed_seconds: float, qat_steps: int) -> float:
        if self.warmdown_fraction is not None:
            left = 1.0 - self.progress(step, elapsed_seconds, qat_steps)
            return min(max(left / self.warmdown_fraction, 0.0), 1.0)
        if not self.warmdown_steps:
            return 1.0
        rate = 1.0
        if self.max_steps is not None:
            left = self.max_steps - self.spent(step, qat_steps)
            rate = min(rate, left / self.warmdown_steps)
        if self.budget_seconds is not None and elapsed_seconds > 0.0:
            warmdown_seconds = self.warmdown_steps * elapsed_seconds / max(step, 1)
            rate = min(rate, (self.budget_seconds - elapsed_seconds) / warmdown_seconds)
        return max(rate, 0.0)

    def momentum(self, step: int) -> float:
        if step >= self.momentum_warmup_steps:
            return self.momentum_end
        done = step / self.momentum_warmup_steps
        return (1 - done) * self.momentum_start + done * self.momentum_end

    def progress(self, step: int, elapsed_seconds: float, qat_steps: int = 0) -> float:
        """Share of the run that is over, by whichever limit is nearer; 1 means stop."""
        by_steps = 0.0
        if self.max_steps is not None:
            by_steps = self.spent(step, qat_steps) / self.max_steps
        by_clock = elapsed_seconds / self.budget_seconds if self.budget_seconds is not None else 0.0
        return max(by_steps, by_clock)

    def shortened(self, seconds: float) -> Schedule:
        """Ends so much sooner, if the clock ends it."""
        if self.budget_seconds is None:
            return self
        return replace(self, budget_seconds=self.budget_seconds - seconds)

    @property
    def asks_for_qat(self) -> bool:
        return bool(self.typed_start)

    @property
    def typed_start(self) -> str:
        """The start as a setting; empty without one."""
        names = ("start_step", "start_fraction", "start_lr_scale")
        values = {name: getattr(self, name) for name in names}
        return ", ".join(f"qat.{name} = {v:g}" for name, v in values.items() if v is not None)

    def qat_starts(self, step: int, elapsed_seconds: float) -> bool:
        """Whether update ``step + 1``, with no QAT before it, may be the first on snapped weights
        (or come after it)."""
        if self.start_step is not None:
            return step >= self.start_step
        if self.start_fraction is not None:
            return self.progress(step, elapsed_seconds) >= self.start_fraction
        if self.start_lr_scale is not None:
            return self.rate(step, elapsed_seconds) <= self.start_lr_scale
        return False

    def nears_qat(self, step: int, elapsed_seconds: float) -> bool:
        """Whether it may start within ``OBSERVED_STEPS`` updates, at the speed measured so far."""
        if step == 0 and self.budget_seconds is not None:
            return self.asks_for_qat  # no speed yet, and the next update may be the last before it
        ahead = step + OBSERVED_STEPS
        return self.qat_starts(ahead, elapsed_seconds * ahead / max(step, 1))

    def qat_stopped(self, step: int) -> bool:
        """Whether update ``step + 1`` comes after the last one that may be on snapped weights."""
        return self.stop_step is not None and step >= self.stop_step

    def blend(self, qat_steps: int) -> float:
        """Share of the snapped weights in the update after ``qat_steps`` updates with QAT on."""
        return min(1.0, (qat_steps + 1) / (self.ramp_steps + 1))

    def updates(self) -> Iterator[Update]:
        """Every update of a run that no clock bounds."""
        assert self.budget_seconds is None
        step = qat_steps = 0
        switched_at: float | None = None
        while (done := self.progress(step, 0.0, qat_steps)) < 1.0:
            if switched_at is None and self.qat_starts(step, 0.0):
                switched_at = done
            is_on = switched_at is not None and not self.qat_stopped(step)
            rate, momentum = self.rate(step, 0.0, qat_steps), self.momentum(step)
            nears = switched_at is None and self.nears_qat(step, 0.0)
            yield Update(rate, momentum, qat_steps, is_on, nears, done, switched_at)
            step, qat_steps = step + 1, qat_steps + is_on

    def last_step(self, step_seconds: float) -> int:
        """Estimated number of updates of the whole run."""
        by_steps = by_clock = math.inf
        if self.max_steps is not None and self.update_price == self.qat_update_price:
            by_steps = math.ceil(self.max_steps / self.update_price)
        elif self.max_steps is not None:
            by_steps = sum(1 for _ in replace(self, budget_seconds=None).updates())
        if self.budget_seconds is not None:
            by_clock = math.ceil(self.budget_seconds / step_seconds)
        return int(min(by_steps, by_clock))
