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
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qat.model.gpt import GPTShape

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
    def timed() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed()
    times = [timed()]
    while len(times) < REPEATS and sum(times) < MAX_SECONDS:
        times.append(timed())
    return statistics.median(times)


def traffic(shape: GPTShape, seq_len: int, *, batch: int = 1) -> Traffic:
    """Of ``batch`` sequences of ``seq_len`` tokens through ``qat/model/gpt.py``, logits of all
    positions, activations in float32.

    Attention counts every pair of positions, as counters of operations do; a kernel that skips the
    future does about half of that, and it keeps its scores to itself.
    """
    dim, mlp_dim, vocab_size = shape.dim, shape.mlp_mult * shape.dim, shape.vocab_size
    kv_dim = shape.num_kv_heads * (dim // shape.num_heads)
    matrices = dim * (2 * dim + 2 * kv_dim + 2 * mlp_dim)  # weights of a block
    scores = 2 * seq_len * dim  # a query against all keys, shares times all values
    products = shape.num_layers * (matrices + scores) + dim * vocab_size
    # Numbers read and written per token.
    norm, add = 2 * dim, 3 * dim
    attention = (
        (3 * dim + dim + 2 * kv_dim)  # to queries, keys and values
        + 2 * 2 * (dim + kv_dim)  # norm and rotation of queries and keys
        + 2 * dim  # gain of the queries
        + (2 * dim + 2 * kv_dim)  # attention itself
        + 2 * dim  # projection
    )
    mlp = (dim + mlp_dim) + 2 * mlp_dim + (mlp_dim + dim)  # up, ReLU^2, down
    block = add + norm + attention + add + norm + mlp + add
    ends = 2 * dim + norm + norm + (dim + vocab_size) + 2 * vocab_size  # embedding, head, softcap
    moved = shape.num_layers * block + shape.num_layers // 2 * add + ends
    tokens = batch * seq_len
    return Traffic(2 * tokens * products, ACTIVATION_BYTES * tokens * moved)
