"""Compiled functions, kept for the life of the process: runs of one shape share their graphs.

A compiled step takes its weights as inputs, so the next run of a sweep finds its graph made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

MAX_KEPT = 32  # then all are dropped, or a long sweep over shapes would fill the memory
MAX_GRAPHS = 4 * MAX_KEPT  # of one function; torch's own limit (8) counts those of all runs

_kept: dict[Hashable, Callable[..., Any]] = {}


def compiled(key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The function that ``make`` gives, compiled whole; made once for each ``key``.

    The key holds all that the function closes over. Batches of another shape, another dtype or
    autocast make another graph of it.
    """
    if key not in _kept:
        if len(_kept) == MAX_KEPT:
            forget()
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        _kept[key] = torch.compile(make(), fullgraph=True, dynamic=False)
    return _kept[key]


def forget() -> None:
    """Drop all graphs of this process."""
    _kept.clear()
    torch.compiler.reset()
