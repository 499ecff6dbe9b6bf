"""The two big passes of a fused snap, for all groups of a batch at once; compiled on a CPU.

On CUDA their place is taken by Triton kernels (``triton_kernels.py``) that give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qat.compiled import compiled
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry
from qat.quantize.rounding import (
    DTYPES,
    Coding,
    coding_from,
    decode_view,
    encode_view,
    group_views,
    join_groups,
    order_statistics,
)

Found = tuple[Tensor, ...]  # order statistics of a batch, each (groups of the batch,)


class GroupBatch(NamedTuple):
    """All groups of one length on one grid, tensor after tensor."""

    grid: Grid
    columns: int
    views: tuple[tuple[str, int], ...]  # tensor and index of the view in ``group_views``
    counts: tuple[int, ...]  # groups of each view


Batches = tuple[GroupBatch, ...]


def _shapes_of_views(entry: Entry) -> list[Tensor]:
    assert entry.grid is not None
    return group_views(torch.empty(entry.shape, device="meta"), entry.grid)


def is_fusable(entry: Entry) -> bool:
    if entry.grid is None or not entry.grid.table.fuses or entry.grid.refit:
        return False
    grid = entry.grid
    return all(order_statistics(view, grid) for view in _shapes_of_views(entry))


def has_kernel(entry: Entry) -> bool:
    """Of a fusable one: whether the Triton kernels know its levels and scales."""
    assert entry.grid is not None
    return entry.grid.table.is_even and entry.grid.scale_dtype in DTYPES


def batches_of(entries: list[Entry]) -> Batches:
    views: dict[tuple[Grid, int], list[tuple[str, int, int]]] = {}
    for entry in entries:
        assert entry.grid is not None
        for index, view in enumerate(_shapes_of_views(entry)):
            key = entry.grid, view.size(-1)
            views.setdefault(key, []).append((entry.name, index, view[..., 0].numel()))
    return tuple(
        GroupBatch(*key, tuple((name, i) for name, i, _ in found), tuple(n for *_, n in found))
        for key, found in views.items()
    )


def _look(weights: Mapping[str, Tensor], batches: Batches) -> list[Found]:
    """Order statistics of every batch, tensor after tensor."""
    found = []
    for grid, _, views, _ in batches:
        parts = [order_statistics(group_views(weights[name], grid)[i], grid) for name, i in views]
        kinds = zip(*parts, strict=True)
        found.append(tuple(torch.cat([part.flatten() for part in kind]) for kind in kinds))
    return found


def _write(
    weights: Mapping[str, Tensor],
    codings: list[Coding],
    into: Mapping[str, Tensor],
    batches: Batches,
) -> None:
    """Write every tensor's snapped weights."""
    parts: dict[str, dict[int, Tensor]] = {name: {} for name in weights}
    for (grid, _, views, _), coding in zip(batches, codings, strict=True):
        start = 0
        for name, i in views:
            view = group_views(weights[name], grid)[i]
            size = view.shape[:-1]
            end = start + size.numel()
            own = coding.part(start, end, size)
            code = encode_view(view, grid, own)
            parts[name][i] = decode_view(code, grid, own.decoding_scale, own.decoding_zero)
            start = end
    for name, w in into.items():
        w.copy_(join_groups([parts[name][i] for i in sorted(parts[name])], w.shape))


class CompiledPasses:
    """The two big passes on a CPU, compiled once for all runs with such tensors on such grids."""

    def coding(self, found: Found, batch: GroupBatch, tensor_scale: Tensor | None) -> Coding:
        """Of scales of a byte, which are rounded by arithmetic that a compiler leaves as it is."""
        make = compiled(("coding", batch.grid), lambda: coding_from)
        return make(found, batch.grid, batch.columns, tensor_scale)

    def __init__(self, batches: Batches) -> None:
        def look(weights: Mapping[str, Tensor]) -> list[Found]:
            return _look(weights, batches)

        def write(
            weights: Mapping[str, Tensor], codings: list[Coding], into: Mapping[str, Tensor]
        ) -> None:
            _write(weights, codings, into, batches)

        self.look = compiled(("look", batches), lambda: look)
        self.write = compiled(("write", batches), lambda: write)
