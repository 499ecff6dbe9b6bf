"""How fast this machine could be: its ceilings of memory and arithmetic, and a forward pass's need.

No forward pass takes less time than its operations at the compute ceiling, nor than its bytes at
the memory ceiling. The ceilings are measured, not taken from a data sheet: what counts is what
torch reaches here, with these threads. The need is counted from shapes, with every operation
reading its inputs and writing its outputs once.

Left out: caches. A model that fits into them can beat the memory ceiling, which is that of a copy
far larger than they are.

Source: Williams, Waterman, Patterson, "Roofline", Communications of the ACM 52 (2009).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from qat.analysis.cost import timed
from qat.model.registry import architecture_of, empty_model
from qat.model.spec import ModelSpec
from qat.model.wiring import arguments

COPY_BYTES = 2**28  # read, and as many written
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
REPEATS, MAX_SECONDS = 9, 0.8  # of each ceiling, whichever ends first
ACTIVATION_BYTES = 4  # float32


@dataclass(frozen=True)
class Ceilings:
    """``bytes_per_second``: read and written, of a copy. ``flops_per_second``: precision ->
    multiplications and additions of a matrix product. ``missing``: precision -> why it has none."""

    bytes_per_second: float
    flops_per_second: dict[str, float]
    missing: dict[str, str]


class Traffic(NamedTuple):
    """Of one forward pass: multiplications and additions, bytes of activations moved."""

    flops: int
    activation_bytes: int


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> Ceilings:
    """Medians of repeats after a warm-up, under 5 seconds on 2 cores; int8 where torch has it."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = _median_seconds(lambda: target.copy_(source), device)
    size = MATRIX_SIZE[device.type]
    reached: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        product = torch._int_mm if dtype == torch.int8 else torch.mm
        try:
            seconds = _median_seconds(partial(product, matrix, matrix), device)
        except RuntimeError as error:  # no such kernel on this device
            missing[name] = str(error).splitlines()[0]
        else:
            reached[name] = 2 * size**3 / seconds
    return Ceilings(2 * COPY_BYTES / copy_seconds, reached, missing)


def _median_seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    timed(work, device)
    times = [timed(work, device)]
    while len(times) < REPEATS and sum(times) < MAX_SECONDS:
        times.append(timed(work, device))
    return statistics.median(times)


class _MatrixTraffic(TorchFunctionMode):
    """Counts the numbers that lookups, products and attention read and write."""

    numbers = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.numbers += sum(tensor.numel() for tensor in args[:3]) + result.numel()
        elif func in (F.linear, F.embedding):  # the weight is no activation, nor are ids
            self.numbers += result.numel()
            self.numbers += args[0].numel() if func is F.linear else result.numel()
        return result


@torch.no_grad()
def traffic(spec: ModelSpec, seq_len: int, *, batch: int = 1) -> Traffic:
    """Of ``batch`` sequences of ``seq_len`` tokens, logits of all positions, activations in
    float32; nothing is computed.

    Attention counts every pair of positions; a kernel that skips the future does about half of
    that, and it keeps its scores to itself. Where the architecture does not say what its other
    operations move (``numbers_moved``), they count as fused into their neighbours.
    """
    ids_BT = torch.zeros(batch, seq_len, dtype=torch.long, device="meta")
    counted = traffic_of(empty_model(spec), ids_BT)
    numbers_moved = getattr(architecture_of(spec), "numbers_moved", None)
    if numbers_moved is None:
        return counted
    return counted._replace(
        activation_bytes=ACTIVATION_BYTES * numbers_moved(spec) * ids_BT.numel()
    )


@torch.no_grad()
def traffic_of(model: nn.Module, inputs: Any) -> Traffic:
    """Of one call of any model (``qat.model.wiring.arguments``), which is made, on its device."""
    args, kwargs = arguments(inputs)
    counted = _MatrixTraffic()
    # Attention as two products, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, counted:
        model(*args, **kwargs)
    return Traffic(counter.get_total_flops(), ACTIVATION_BYTES * counted.numbers)
