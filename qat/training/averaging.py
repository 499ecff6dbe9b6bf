"""Weight averaging on the device: what is stored instead of the last weights.

Two ways to meet QAT. ``of="masters"``: average the float weights; the average is snapped when it is
stored. ``of="snapped"``: average what a file of that step would hold while QAT is on (and the
masters before); that average is off the grid, and snapped once more when stored. Learned scales are
averaged beside the weights in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.quantize.switch import QatSwitch
from qat.training.loop import TrainingLoop, UpdateHook

MEANS = ("weights", "learned_scales")


@dataclass
class Mean:
    """Of the tensors handed to ``add``: exponential with ``decay``, plain without."""

    decay: float | None
    count: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor]) -> None:
        new = {name: t.detach() for name, t in tensors.items()}
        if self.count == 0:
            self.tensors = {name: t.clone() for name, t in new.items()}
        else:
            share = 1 / (self.count + 1) if self.decay is None else 1 - self.decay
            # A resumed mean was read into the CPU's memory.
            means = {name: mean.to(new[name].device) for name, mean in self.tensors.items()}
            torch._foreach_lerp_(list(means.values()), [new[name] for name in means], share)
            self.tensors = means
        self.count += 1


class Averaging(UpdateHook):
    """``weights`` and ``learned_scales`` so far; no weights before the first ``add``."""

    name = "averaging"

    def __init__(
        self,
        kind: str,
        decay: float = 0.0,
        start_fraction: float = 0.0,
        every_steps: int = 1,
        of: str = "masters",
    ) -> None:
        self.is_asked, self.of = kind != "none", of
        self.start_fraction, self.every_steps = start_fraction, every_steps
        self.weights, self.learned_scales = (Mean(decay if kind == "ema" else None) for _ in "ws")

    def is_due(self, step: int, done: float) -> bool:
        """After update number ``step``, with that share of the run over; always after the last."""
        on_turn = done >= self.start_fraction and step % self.every_steps == 0
        return self.is_asked and (on_turn or done >= 1.0)

    def after_update(self, loop: TrainingLoop) -> None:
        if self.is_due(loop.progress.step, loop.done):
            self.add(loop.masters, loop.switch)

    def add(self, masters: Mapping[str, Tensor], switch: QatSwitch) -> None:
        weights: Mapping[str, Tensor] = masters
        if self.of == "snapped" and switch.is_on:
            weights = switch.plan.snap(masters, switch.learned_scales)
        self.weights.add(weights)
        if switch.learned_scales:
            self.learned_scales.add(switch.learned_scales)

    def state(self) -> dict[str, Any]:
        means = {name: getattr(self, name) for name in MEANS}
        return {name: {"count": m.count, "tensors": m.tensors} for name, m in means.items()}

    def load_state(self, state: Mapping[str, Any], loop: TrainingLoop) -> None:
        for name in MEANS:  # the decay is a setting, and that of this run
            mean = getattr(self, name)
            mean.count, mean.tensors = state[name]["count"], state[name]["tensors"]
