"""The search for scales with which a file fills its budget.

All scales are zoomed together. A file shrinks as scales grow, by about a bit per weight and octave:
less where 8 bits hold scales back or most codes are 0, and in small jumps, as scales have few
digits. So the search keeps the nearest files on both sides and draws a line between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from qat.budget.budget import WINDOW

REACH = 1.5  # octaves of the scales, either way
TRIALS = 20
FLAT = 0.1  # of the bytes that a move should bring: then the next one goes all the way
A_MOVE = 0.25  # octaves; after less, sizes may say anything
NEAREST_END = 0.05  # of the way between two files: a line that is off must not get stuck there

Made = TypeVar("Made")


@dataclass(frozen=True)
class Trial(Generic[Made]):
    """A file with all scales 2 ** ``log2_zoom`` times as large; ``made``: what it is made of."""

    log2_zoom: float
    num_bytes: float
    made: Made


def fill(
    trial_at: Callable[[float], Trial[Made]],
    first: Trial[Made],
    bytes_per_octave: float,
    budget_bytes: float,
    window: float = WINDOW,
    reach: float = REACH,
) -> Trial[Made]:
    """The first file of at least ``window`` * budget and at most the budget, from ``first`` on.

    If none is found, the largest of those that fit; if none fits, the smallest.
    ``bytes_per_octave``: what scales twice as large are expected to save.
    """
    target = (1 + window) / 2 * budget_bytes
    finer: Trial[Made] | None = None  # the nearest file above the budget
    coarser: Trial[Made] | None = None  # and the nearest within it
    here, best = first, first
    moves = 0  # that ended on the same side, one after the other
    is_flat = False  # the last move brought nothing
    for _ in range(TRIALS):
        if window * budget_bytes <= here.num_bytes <= budget_bytes:
            return here
        is_above = here.num_bytes > budget_bytes
        finer, coarser = (here, coarser) if is_above else (finer, here)
        if finer is not None and coarser is not None:
            place = _between(finer, coarser, target, halve=moves > 0)
        else:
            wanted = (here.num_bytes - target) / bytes_per_octave * 2**moves
            wanted = math.copysign(2 * reach, wanted) if is_flat else wanted
            place = min(max(here.log2_zoom + wanted, -reach), reach)
        before, here = here, trial_at(place)
        moves = moves + 1 if (here.num_bytes > budget_bytes) == is_above else 0
        best = _better(best, here, budget_bytes)
        is_flat = _is_flat(before, here, bytes_per_octave)
        if place == before.log2_zoom:
            break
    return best


def _between(finer: Trial, coarser: Trial, target: float, halve: bool) -> float:
    """The zoom at which a line between two files reaches the target, or half-way."""
    share = (finer.num_bytes - target) / (finer.num_bytes - coarser.num_bytes)
    share = 0.5 if halve else min(max(share, NEAREST_END), 1 - NEAREST_END)
    return finer.log2_zoom + share * (coarser.log2_zoom - finer.log2_zoom)


def _is_flat(before: Trial, here: Trial, bytes_per_octave: float) -> bool:
    """Sizes hardly change: 8 bits hold scales back, or all codes are 0."""
    moved = before.log2_zoom - here.log2_zoom
    brought = here.num_bytes - before.num_bytes
    return abs(moved) > A_MOVE and abs(brought) < FLAT * abs(moved) * bytes_per_octave


def _better(one: Trial[Made], other: Trial[Made], budget_bytes: float) -> Trial[Made]:
    fits = [trial for trial in (one, other) if trial.num_bytes <= budget_bytes]
    if fits:
        return max(fits, key=lambda trial: trial.num_bytes)
    return min((one, other), key=lambda trial: trial.num_bytes)
