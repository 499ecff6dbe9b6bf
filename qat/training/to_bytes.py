"""Training to a number of bytes, around the updates: see ``qat.budget.price_control``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.budget.price_control import PriceControl
from qat.training.loop import TrainingLoop, UpdateHook


class TrainToBytes(UpdateHook):
    """The price of a bit among the gradients; the clock keeps time back for the last encodings."""

    name = "price_control"

    def __init__(self, control: PriceControl) -> None:
        self.control = control

    def prime(self, loop: TrainingLoop) -> None:
        self.control.to(loop.device)  # a resumed one was read into the CPU's memory
        self.control.prime(loop.masters)

    def before_update(self, loop: TrainingLoop) -> None:
        if loop.model.is_on:
            self.control.add_gradients(loop.masters, loop.switch.learned_scales)
        elif loop.schedule.nears_qat(loop.progress.step, loop.progress.elapsed_seconds):
            self.control.observe(loop.masters)

    def at_switch(self, loop: TrainingLoop) -> None:
        loop.switch.set_scales(self.control.first_scales(loop.masters))
        loop.schedule = loop.schedule.shortened(self.control.kept_seconds)

    def after_update(self, loop: TrainingLoop) -> None:
        if loop.model.is_on and not loop.is_over:
            scales = loop.switch.learned_scales
            self.control.follow(loop.masters, scales, loop.done_since_switch)

    def after_last_update(self, loop: TrainingLoop) -> None:
        if loop.model.is_on:
            self.control.land(loop.masters, loop.switch.learned_scales)

    def state(self) -> dict[str, Any]:
        return self.control.state()

    def load_state(self, state: Mapping[str, Any], loop: TrainingLoop) -> None:
        self.control.load_state(state)
        if loop.switched_at is not None:
            loop.schedule = loop.schedule.shortened(self.control.kept_seconds)
