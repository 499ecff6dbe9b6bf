"""Which arm goes on from which: the updates that several share are made once.

Runs are put into a tree: first the baseline, then, one after another, the run that shares most
updates with one that is in it. What shares nothing is trained in one piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qat.runs.fork import APART, Course
from qat.runs.result import differing
from qat.settings.schema import TrainSettings


class Fork(NamedTuple):
    """Where a run leaves another."""

    run: str
    step: int


def kept_by(run: str, forks: Mapping[str, Fork]) -> list[int]:
    """Steps at which others leave it."""
    return sorted({fork.step for fork in forks.values() if fork.run == run})


def find_forks(
    runs: Mapping[str, TrainSettings],
    last_kept: Callable[[str, int], int] = lambda run, step: step,
) -> dict[str, Fork]:
    """``runs``: name -> settings, baselines first. ``last_kept``: the last step, up to this one, at
    which a run keeps, or kept, its state; 0 if there is none. Those that have a fork, by name."""
    found: dict[str, Fork] = {}
    groups: dict[str, dict[str, Course]] = {}
    for name, s in runs.items():
        if s.budget_seconds is not None:
            continue
        course = Course.of(s)
        same = differing(course.conditions, {}, APART)
        key = json.dumps({name: course.conditions[name] for name in same}, default=str)
        groups.setdefault(key, {})[name] = course
    for courses in groups.values():
        _grow(courses, last_kept, found)
    return found


def _grow(
    courses: dict[str, Course], last_kept: Callable[[str, int], int], found: dict[str, Fork]
) -> None:
    nearest: dict[str, Fork | None] = dict.fromkeys(courses)
    left = list(courses)
    while left:
        name = max(left, key=lambda run: fork.step if (fork := nearest[run]) else 0)
        left.remove(name)
        start = 0  # of the updates that this run makes itself
        if (fork := nearest[name]) is not None:
            found[name], start = fork, fork.step
        for other in left:
            best = nearest[other]
            step = last_kept(name, courses[name].shared(courses[other]))
            if step > max(start, best.step if best else 0):
                nearest[other] = Fork(name, step)
