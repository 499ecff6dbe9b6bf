"""Clipped, and weights that flip to and fro are held still (iterative freezing, arXiv 2203.11086).

A flip counts where a code changes in the other direction than the last time. A weight whose running
mean of flips exceeds a limit is frozen at the level that it was nearest to on average: its master
is moved there, and follows its scale from then on. The limit falls from ``FIRST`` at the switch to
``LAST`` by a half cosine; these and the memory are this project's, not tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.quantize.gradients import Seen
from qat.quantize.gradients.clipped import Clipped
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, in_scale_units, round_to_levels, scales_of

MEMORY = 0.98
FIRST, LAST = 0.04, 0.01  # flips an update


def limit(progress: float) -> float:
    return LAST + (FIRST - LAST) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Memory(NamedTuple):
    """Of one tensor, each of its shape."""

    level: Tensor  # seen last
    direction: Tensor  # of its last change: -1, 0 (none yet), 1
    flips: Tensor  # running mean
    average: Tensor  # of its levels
    held: Tensor  # whether it is frozen


class Freeze(Clipped):
    anneals = True
    strength = 1.0  # of the flips, against the limit
    takes_rotated = False

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}

    def see(
        self, w: Tensor, grid: Grid, *, name: str = "", progress: float = 0.0, **_: Any
    ) -> Seen:
        scales = scales_of(w, grid)

        def levels_of(view: Tensor, scale: Tensor) -> tuple[Tensor]:
            return (round_to_levels(in_scale_units(view, scale), grid),)

        (level,) = by_group(levels_of, w, scales, grid)
        self.memory[name] = memory = self._remember(level, self.memory.get(name), progress)
        if memory.held.any():
            still = round_to_levels(memory.average, grid)

            def placed(view: Tensor, scale: Tensor) -> tuple[Tensor]:
                return (view * scale,)

            (at,) = by_group(placed, still, scales, grid)
            w.copy_(torch.where(memory.held, at, w))
        seen = super().see(w, grid)
        assert seen.slope is not None
        return seen._replace(slope=seen.slope * ~memory.held)

    def _remember(self, level: Tensor, before: Memory | None, progress: float) -> Memory:
        if before is None:
            none = torch.zeros_like(level)
            return Memory(level, none, none.clone(), level.clone(), none.bool())
        change = (level - before.level).sign()
        flipped = (change * before.direction < 0).float()
        flips = before.flips.lerp(flipped, 1.0 - MEMORY)
        average = torch.where(before.held, before.average, before.average.lerp(level, 1.0 - MEMORY))
        direction = torch.where(change == 0, before.direction, change)
        is_over = self.strength * flips > limit(progress)
        return Memory(level, direction, flips, average, before.held | is_over)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{part} {name}": tensor
            for name, memory in self.memory.items()
            for part, tensor in memory._asdict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        names = {key.split(" ", 1)[1] for key in state}
        parts = Memory._fields
        self.memory = {n: Memory(*(state[f"{part} {n}"].clone() for part in parts)) for n in names}


RULE = Freeze
