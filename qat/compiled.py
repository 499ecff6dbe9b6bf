"""Compiled functions, kept for the life of the process: runs of one shape share their graphs.

A compiled step takes its weights as inputs, so the next run of a sweep finds its graph made. What
numba compiles is kept on disk too, where there is a place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch

MAX_KEPT = 32  # when the next model comes, or a long sweep over shapes would fill the memory
MAX_GRAPHS = 1024  # of one function, a graph each shape; torch's own limit is 8

_kept: dict[Hashable, Callable[..., Any]] = {}


def compiled(key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The function that ``make`` gives, compiled whole; made once for each ``key``.

    The key holds all that the function closes over. Batches of another shape, another dtype or
    autocast make another graph of it.
    """
    if key not in _kept:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        _kept[key] = torch.compile(_alone(make()), fullgraph=True, dynamic=False)
    return _kept[key]


def _alone(function: Any) -> Any:
    """With code of its own: torch looks for graphs, and counts them, by the code they are of."""
    if not isinstance(function, FunctionType):
        return function
    alone = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    alone.__kwdefaults__ = function.__kwdefaults__
    return alone


def make_room() -> None:
    """Before a model's functions are compiled; one model may have any number of them."""
    if len(_kept) >= MAX_KEPT:
        forget()


def machine_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by numba, free of the interpreter's lock.

    Numba keeps its work beside the source, else in the user's cache, and refuses to work where it
    can write to neither (a read-only install, no home). Then, and where the disk is full, it is
    compiled again by each process: seconds.
    """
    from numba import njit

    try:
        made = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)
    if hasattr(made, "_cache"):  # NUMBA_DISABLE_JIT=1 gives the function back
        save = made._cache.save_overload

        def save_if_possible(signature: Any, data: Any) -> None:
            with suppress(OSError):
                save(signature, data)

        made._cache.save_overload = save_if_possible
    return made


def forget() -> None:
    """Drop all graphs of this process."""
    _kept.clear()
    torch.compiler.reset()
