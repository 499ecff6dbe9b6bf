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
from qat.quantize.gradients.clipped import Clipped, clip
from qat.quantize.grid import Grid
from qat.quantize.rounding import encode, in_scale_units, round_to_levels

MEMORY = 0.98
FIRST, LAST = 0.04, 0.01  # flips an update


def limit(progress: float) -> float:
    return LAST + (FIRST - LAST) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Memory(NamedTuple):
    """Of one tensor, each of its shape. Small numbers are int8."""

    code: Tensor  # seen last
    direction: Tensor  # of its last change: -1, 0 (none yet), 1
    flips: Tensor  # running mean
    average: Tensor  # of its levels
    held: Tensor  # 1 where it is frozen


def settle(
    view: Tensor, scale: Tensor, code: Tensor, *memory: Tensor, grid: Grid, number: Tensor
) -> tuple[Tensor, ...]:
    """Masters where they belong, and what is remembered; more flips than ``number`` freeze one."""
    # In float32: a loop over what is narrower is not vectorized.
    direction, flips, average, held = (part.float() for part in memory)
    level = round_to_levels(in_scale_units(view, scale), grid)
    change = (level - grid.table.from_codes(code.contiguous())).sign()
    flipped = (change * direction < 0).float()
    flips = flips + (1.0 - MEMORY) * (flipped - flips)
    average = torch.where(held > 0, average, average + (1.0 - MEMORY) * (level - average))
    direction = torch.where(change == 0, direction, change)
    held = torch.maximum(held, (flips > number).float())
    placed = torch.where(held > 0, round_to_levels(average, grid) * scale, view)
    code = grid.table.to_codes(level)
    return placed, code, direction.to(torch.int8), flips, average, held.to(torch.int8)


def clip_free(
    view: Tensor, scale: Tensor, held: Tensor, *, grid: Grid, number: Tensor
) -> tuple[Tensor, Tensor]:
    seen, inside = clip(view, scale, grid=grid, number=number)
    return seen, inside * (held == 0)


class Freeze(Clipped):
    anneals = True
    strength = 1.0  # of the flips, against the limit
    takes_rotated = False

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}

    def see(
        self, w: Tensor, grid: Grid, *, name: str = "", progress: float = 0.0, **_: Any
    ) -> Seen:
        if name in self.memory:
            most = limit(progress) / self.strength if self.strength else math.inf
            placed, *memory = self.by_group(settle, w, grid, *self.memory[name], number=most)
            self.memory[name] = Memory(*memory)
            w.copy_(placed)
        else:
            self.memory[name] = _begin(w, grid)
        held = self.memory[name].held
        return Seen(*self.by_group(clip_free, w, grid, held, number=self.beyond))

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


def _begin(w: Tensor, grid: Grid) -> Memory:
    code = encode(w, grid).codes
    none = torch.zeros_like(code)
    return Memory(code, none, torch.zeros_like(w), grid.table.from_codes(code), none)


RULE = Freeze
