"""Clipped, and weights that flip to and fro are held still (iterative freezing, arXiv 2203.11086).

A flip counts where a code changes in the other direction than the last time. A weight whose running
mean of flips exceeds a limit is frozen at the level that it was nearest to on average: its master
is moved there, and follows its scale from then on. The limit falls from ``FIRST`` at the switch to
``LAST`` by a half cosine; these and the memory are this project's, not tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.compiled import compiled
from qat.quantize.fused import has_one_statistic
from qat.quantize.gradients import Seen
from qat.quantize.gradients.clipped import Clipped, clip
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, encode, in_scale_units, round_to_levels, scales_of

MEMORY = 0.98
FIRST, LAST = 0.04, 0.01  # flips an update
FROZEN = 2.0  # in place of a running mean, which is at most 1


def limit(progress: float) -> float:
    return LAST + (FIRST - LAST) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Memory(NamedTuple):
    """Of one tensor, each of its shape: 6 bytes a weight, since time goes by the bytes moved."""

    code: Tensor  # int8: seen last
    direction: Tensor  # int8: of its last change: -1, 0 (none yet), 1
    flips: Tensor  # float16: running mean, or FROZEN
    offset: Tensor  # float16: of the running mean of its levels from the last one

    @property
    def is_held(self) -> Tensor:
        return self.flips > 1.0


def settle(
    view: Tensor, scale: Tensor, code: Tensor, *memory: Tensor, grid: Grid, number: Tensor
) -> tuple[Tensor, ...]:
    """Masters where they belong, and what is remembered; more flips than ``number`` freeze one."""
    # In float32: a loop over what is narrower is not vectorized.
    direction, flips, offset = (part.float() for part in memory)
    level, last = round_to_levels(in_scale_units(view, scale), grid), _levels(code, grid)
    change = (level - last).sign()
    flipped = (change * direction < 0).float()
    direction = torch.where(change == 0, direction, change)
    average = last + offset
    average = torch.where(flips > 1.0, average, average + (1.0 - MEMORY) * (level - average))
    flips = torch.where(flips > 1.0, flips, flips + (1.0 - MEMORY) * (flipped - flips))
    flips = torch.where(flips > number, FROZEN, flips)
    placed = torch.where(flips > 1.0, round_to_levels(average, grid) * scale, view)
    code = grid.table.to_codes(level)
    return placed, code, direction.to(torch.int8), flips.half(), (average - level).half()


def clip_free(
    view: Tensor, scale: Tensor, flips: Tensor, *, grid: Grid, number: Tensor
) -> tuple[Tensor, Tensor]:
    seen, inside = clip(view, scale, grid=grid, number=number)
    return seen, torch.where(flips.float() > 1.0, 0.0, inside)


def settle_and_clip(
    w: Tensor, number: Tensor, beyond: Tensor, *memory: Tensor, grid: Grid
) -> list[Tensor]:
    """The weight seen and its slope, what is remembered, and two scales; ``w`` moves in place."""
    scales = scales_of(w, grid)
    settled = partial(settle, grid=grid, number=number)
    placed, *news = by_group(settled, w, scales, grid, *memory)
    w.copy_(placed)
    scales_now, free = scales_of(placed, grid), partial(clip_free, grid=grid, number=beyond)
    seen = by_group(free, placed, scales_now, grid, Memory(*news).flips)
    return [*seen, *news, scales, scales_now]  # the last ones: see ``GradientRule.by_group``


class Freeze(Clipped):
    anneals = True
    strength = 1.0  # of the flips, against the limit
    takes_rotated = False

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}

    def see(
        self, w: Tensor, grid: Grid, *, name: str = "", progress: float = 0.0, **_: Any
    ) -> Seen:
        if name not in self.memory:
            self.memory[name] = _begin(w, grid)
            return super().see(w, grid)
        most = limit(progress) / self.strength if self.strength else math.inf

        def one_pass(*tensors: Tensor) -> list[Tensor]:
            return settle_and_clip(*tensors, grid=grid)

        run = one_pass
        if self.compiles and not w.is_cuda and has_one_statistic(tuple(w.shape), grid):
            run = compiled((settle_and_clip, grid), lambda: one_pass)
        numbers = torch.tensor([most, self.beyond], dtype=torch.float32, device="cpu")
        memory = (part.to(w.device) for part in self.memory[name])
        seen, slope, *news = run(w, *numbers, *memory)
        self.memory[name] = Memory(*news[:4])
        return Seen(seen, slope)

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


def _levels(code: Tensor, grid: Grid) -> Tensor:
    return grid.table.from_codes(code.contiguous())


def _begin(w: Tensor, grid: Grid) -> Memory:
    code = encode(w, grid).codes
    none = torch.zeros_like(w, dtype=torch.float16)
    return Memory(code, torch.zeros_like(code), none, none)


RULE = Freeze
