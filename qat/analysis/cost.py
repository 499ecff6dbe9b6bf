"""What scoring costs: latency, throughput and memory of forward passes, warm-up left out.

The weights are float32 in every case here, so this is the price of the architecture on this
machine, not of a storage format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.evaluation.score import Scorer

WARM_UP = 3
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


@torch.inference_mode()
def measure_cost(scorer: Scorer, weights: Mapping[str, Tensor], repeats: int) -> InferenceCost:
    """Logits of all positions of sequences of ``eval.seq_len`` tokens, ``repeats`` times each."""
    device, settings = scorer.device, scorer.settings
    placed = {name: w.to(device) for name, w in weights.items()}
    seq_len = settings.seq_len or scorer.seq_len
    ids = torch.from_numpy(scorer.stream.take(0, seq_len)).to(device)
    rows = max(1, settings.batch_tokens // seq_len)

    def forward(ids_BT: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            torch.func.functional_call(scorer.model, placed, (ids_BT,))

    one, many = ids.expand(1, -1), ids.expand(rows, -1)
    calls = (lambda: forward(one), lambda: forward(many))
    return time_calls(*calls, rows * seq_len, repeats, device)


def time_calls(
    one: Callable[[], object],
    many: Callable[[], object],
    num_items: int,
    repeats: int,
    device: torch.device,
) -> InferenceCost:
    """Of a call for one item, and of one for ``num_items``, ``repeats`` times each."""

    def seconds(call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(WARM_UP + repeats):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return times[WARM_UP:]

    is_reset = _reset_peak(device)
    latency_ms = [1000 * s for s in seconds(one)]
    items_per_second = [num_items / s for s in seconds(many)]
    peak = _peak_bytes(device) if is_reset else None
    return InferenceCost(_spread(latency_ms), _spread(items_per_second), peak)


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
