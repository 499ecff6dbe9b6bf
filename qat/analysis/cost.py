"""What scoring costs: latency, throughput and memory of forward passes, warm-up left out.

Absolute numbers are those of this machine in that minute. Two models are compared by ratios of
calls in turn (``time_in_turn``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.evaluation.score import Scorer

WARM_UP = 3
IN_TURN_SECONDS = 0.5  # of each pair of calls, though ``repeats`` of them took less
MOST_IN_TURN = 100
CLEAR_PEAK = "5"  # man proc_pid_clear_refs: resets the peak resident size


@dataclass(frozen=True)
class Spread:
    """Of repeated timings."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class InferenceCost:
    """``latency_ms``: one sequence by itself. ``tokens_per_second``: batches of batch_tokens (or,
    of another model than a language model, ``time_calls``: its items).

    ``peak_memory_bytes``: highest resident size of the process while timed, or memory allocated on
    the GPU; None where the system does not tell.
    """

    latency_ms: Spread
    tokens_per_second: Spread
    peak_memory_bytes: int | None


class Calls(NamedTuple):
    """Of one model: for one item, and for ``num_items`` of them at once."""

    one: Callable[[], object]
    many: Callable[[], object]
    num_items: int


class Speedup(NamedTuple):
    """How many times as fast as another model."""

    latency: Spread
    throughput: Spread


def measure_cost(scorer: Scorer, weights: Mapping[str, Tensor], repeats: int) -> InferenceCost:
    """Logits of all positions of sequences of ``eval.seq_len`` tokens, ``repeats`` times each."""
    return time_calls(calls_of(scorer, weights), repeats, scorer.device)


def calls_of(scorer: Scorer, weights: Mapping[str, Tensor]) -> Calls:
    device, settings = scorer.device, scorer.settings
    placed = {name: w.to(device) for name, w in weights.items()}
    seq_len = settings.seq_len or scorer.seq_len
    ids = torch.from_numpy(scorer.stream.take(0, seq_len)).to(device)
    rows = max(1, settings.batch_tokens // seq_len)

    @torch.inference_mode()
    def forward(ids_BT: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            torch.func.functional_call(scorer.model, placed, (ids_BT,))

    one, many = ids.expand(1, -1), ids.expand(rows, -1)
    return Calls(lambda: forward(one), lambda: forward(many), rows * seq_len)


def time_calls(calls: Calls, repeats: int, device: torch.device) -> InferenceCost:
    is_reset = _reset_peak(device)
    latency_ms = [1000 * s for s in _seconds(calls.one, repeats, device)]
    items_per_second = [calls.num_items / s for s in _seconds(calls.many, repeats, device)]
    peak = _peak_bytes(device) if is_reset else None
    return InferenceCost(_spread(latency_ms), _spread(items_per_second), peak)


def time_in_turn(calls: Calls, others: Calls, repeats: int, device: torch.device) -> Speedup:
    """Of ``calls`` over ``others``, by the ratio of neighbours: a machine gets faster and slower by
    tens of percent from minute to minute, and both in a pair meet the same."""

    def ratios(call: Callable[[], object], other: Callable[[], object]) -> Spread:
        found: list[float] = []
        spent = 0.0
        for _ in range(WARM_UP):
            timed(other, device), timed(call, device)
        while len(found) < repeats or (spent < IN_TURN_SECONDS and len(found) < MOST_IN_TURN):
            theirs, ours = timed(other, device), timed(call, device)
            found.append(theirs / ours)
            spent += theirs + ours
        return _spread(found)

    assert calls.num_items == others.num_items
    return Speedup(ratios(calls.one, others.one), ratios(calls.many, others.many))


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    return [timed(call, device) for _ in range(WARM_UP + repeats)][WARM_UP:]


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done with it."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _spread(values: list[float]) -> Spread:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def _reset_peak(device: torch.device) -> bool:
    """Whether the peak starts anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    except OSError:  # another system, or not allowed: then the peak is not known
        return False
    return True


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
