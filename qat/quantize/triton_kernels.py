"""A fused snap on CUDA: two launches for all groups of one length on one grid.

The first finds order statistics, plain torch makes the few scales of them, the second rounds.

The bits are those of the plain torch operations: division is rounded to nearest (``div_rn``; the
plain operator is two units off now and then), rounding to even is an addition of 1.5 * 2^23 (exact
below 2^22, where codes are clamped anyway), and what remains is maxima, clamps and one product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.plan import Entry
from qat.quantize.rounding import Coding, coding_from, group_views, order_statistics

MAX_BLOCK = 1024
MAXIMUM, TOP_TWO, RANGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _group(pointers, tensor_of, offset_of):
    """Address of this program's group of weights."""
    group = tl.program_id(0)
    address = tl.load(pointers + tl.load(tensor_of + group))
    return address.to(tl.pointer_type(tl.float32)) + tl.load(offset_of + group)


@triton.jit
def _look_kernel(
    pointers, tensor_of, offset_of, found, second_found,
    columns: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    weights = _group(pointers, tensor_of, offset_of)
    lane = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], -float("inf") if KIND == RANGE else -1.0, tl.float32)
    low = tl.full([BLOCK], float("inf") if KIND == RANGE else -1.0, tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lane < columns
        if KIND == RANGE:
            low = tl.minimum(low, tl.load(weights + start + lane, inside, float("inf")))
            high = tl.maximum(high, tl.load(weights + start + lane, inside, -float("inf")))
        else:
            w = tl.where(inside, tl.abs(tl.load(weights + start + lane, inside, 0.0)), -1.0)
            low = tl.maximum(low, tl.minimum(high, w))
            high = tl.maximum(high, w)
    group = tl.program_id(0)
    if KIND == RANGE:
        tl.store(found + group, tl.min(low))
        tl.store(second_found + group, tl.max(high))
    else:
        first = tl.max(high)
        tl.store(found + group, first)
        if KIND == TOP_TWO:
            is_first = high == first
            second = tl.max(tl.where(is_first, low, high))
            shared = (tl.sum(is_first.to(tl.int32)) > 1) | (columns == 1)
            tl.store(second_found + group, tl.where(shared, first, second))


@triton.jit
def _write_kernel(
    pointers, into_pointers, tensor_of, offset_of, scales, code_scales, zeros, clips,
    lowest: tl.constexpr, highest: tl.constexpr, columns: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_CLIP: tl.constexpr,
):  # fmt: skip
    weights = _group(pointers, tensor_of, offset_of)
    into = _group(into_pointers, tensor_of, offset_of)
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    scale = tl.load(scales + group)
    code_scale = tl.load(code_scales + group)
    divisor = tl.where(code_scale > 0, code_scale, float("inf"))
    for start in range(0, columns, BLOCK):
        inside = start + lane < columns
        w = tl.load(weights + start + lane, inside, 0.0)
        if HAS_CLIP:
            clip = tl.load(clips + group)
            w = tl.minimum(tl.maximum(w, -clip), clip)
        x = tl.div_rn(w, tl.broadcast_to(divisor, [BLOCK]))
        x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
        code = (x + 12582912.0) - 12582912.0
        if HAS_ZERO:
            zero = tl.load(zeros + group)
            code = tl.minimum(tl.maximum(code + zero, lowest), highest) - zero
        else:
            code = tl.minimum(tl.maximum(code, lowest), highest)
        tl.store(into + start + lane, code * scale + 0.0, inside)


class GroupBatch(NamedTuple):
    """All groups of one length on one grid, tensor after tensor."""

    grid: Grid
    columns: int
    views: list[tuple[str, int]]  # tensor and index of the view in ``group_views``


def batches_of(entries: list[Entry]) -> list[GroupBatch]:
    batches: dict[tuple[Grid, int], GroupBatch] = {}
    for entry in entries:
        assert entry.grid is not None
        for index, view in enumerate(
            group_views(torch.empty(entry.shape, device="meta"), entry.grid)
        ):
            key = entry.grid, view.size(-1)
            batches.setdefault(key, GroupBatch(*key, [])).views.append((entry.name, index))
    return list(batches.values())


class TritonSnap:
    """Of one plan's tensors; tables of addresses are made once."""

    def __init__(self, weights: Mapping[str, Tensor], entries: list[Entry]) -> None:
        self._batches = batches_of(entries)
        self._device = next(iter(weights.values())).device
        self._tables = [self._table(weights, batch) for batch in self._batches]
        self._pointers: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        codings = [
            coding_from(found, batch.grid, batch.columns)
            for batch, found in zip(self._batches, self._look(weights), strict=True)
        ]
        self._write(weights, codings, into)

    def _table(self, weights: Mapping[str, Tensor], batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """Per group of the batch: which tensor, and where in it."""
        names = list(weights)
        tensors, offsets = [], []
        for name, i in batch.views:
            places = torch.arange(weights[name].numel()).view(weights[name].shape)
            start = group_views(places, batch.grid)[i][..., 0].flatten()
            offsets.append(start)
            tensors.append(torch.full_like(start, names.index(name)))
        return torch.cat(tensors).to(self._device), torch.cat(offsets).to(self._device)

    def _addresses(self, tensors: Mapping[str, Tensor]) -> Tensor:
        addresses = tuple(t.data_ptr() for t in tensors.values())
        if addresses not in self._pointers:
            self._pointers[addresses] = torch.tensor(addresses, device=self._device)
        return self._pointers[addresses]

    def _look(self, weights: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """Order statistics of every batch, each (groups of the batch,)."""
        found: list[tuple[Tensor, ...]] = []
        pointers = self._addresses(weights)
        for batch, (tensor_of, offset_of) in zip(self._batches, self._tables, strict=True):
            probe = torch.empty(1, 1, batch.columns, device="meta")
            count = len(order_statistics(probe, batch.grid))
            is_range = batch.grid.range == "asymmetric"
            kind = RANGE if is_range else TOP_TWO if count == 2 else MAXIMUM
            out = torch.empty(2, len(tensor_of), device=self._device)
            _look_kernel[(len(tensor_of),)](
                pointers, tensor_of, offset_of, out[0], out[1],
                columns=batch.columns, BLOCK=_block(batch.columns), KIND=kind,
            )  # fmt: skip
            found.append(tuple(out[:count]))
        return found

    def _write(
        self,
        weights: Mapping[str, Tensor],
        codings: list[Coding],
        into: Mapping[str, Tensor],
    ) -> None:
        pointers, into_pointers = self._addresses(weights), self._addresses(into)
        for batch, coding, (tensor_of, offset_of) in zip(
            self._batches, codings, self._tables, strict=True
        ):
            low, high = batch.grid.table.limits
            scale = coding.stored_scale
            _write_kernel[(len(tensor_of),)](
                pointers, into_pointers, tensor_of, offset_of, scale, coding.code_scale,
                scale if coding.zero is None else coding.zero,
                scale if coding.clip is None else coding.clip,
                lowest=float(low), highest=float(high), columns=batch.columns,
                BLOCK=_block(batch.columns), HAS_ZERO=coding.zero is not None,
                HAS_CLIP=coding.clip is not None,
            )  # fmt: skip


def _block(columns: int) -> int:
    return min(triton.next_power_of_2(columns), MAX_BLOCK)
