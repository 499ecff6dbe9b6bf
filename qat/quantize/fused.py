"""``Plan.snap`` for all tensors at once, with the same bits: what the training loop calls.

On a CPU it is the plain code of rounding.py, compiled: a group's scale and its weights are found
while it is in the cache. On CUDA Triton kernels do it (triton_kernels.py).

Fused are the grids whose bits do not depend on the order of work: scales from maxima and minima
(amax, exact percentile, power), and levels that a compiler rounds to as torch does; on CUDA whole
numbers alone, which the kernels are written for. Sums round differently when reordered, so the
other grids, and plain tensors, go through ``Entry.snap``. Where a grid rotates, plain torch rotates
before and after the passes, which see rotated weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qat.compiled import compiled
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import (
    DTYPES,
    Coding,
    coding_from,
    decode_view,
    encode_view,
    group_views,
    join_groups,
    order_statistics,
    rotate_,
    snap,
    tensor_scale_of,
)

Codings = list[Coding]  # of a tensor's views


def is_fusable(entry: Entry) -> bool:
    if entry.grid is None or not entry.grid.table.fuses or entry.grid.refit:
        return False
    grid = entry.grid
    views = group_views(torch.empty(entry.shape, device="meta"), grid)
    return all(order_statistics(view, grid) for view in views)


@cache
def has_one_statistic(shape: tuple[int, ...], grid: Grid) -> bool:
    """Whether a group's scale is made of one number that a pass over the group may find, and
    nothing else is made of it."""
    if not grid.table.fuses or grid.refit or grid.has_tensor_scale or grid.table.multiplies:
        return False
    view = group_views(torch.empty(shape, device="meta"), grid)[0]
    return len(order_statistics(view, grid)) == 1


def has_kernel(entry: Entry) -> bool:
    """Of a fusable one: whether the Triton kernels know its levels and scales."""
    assert entry.grid is not None
    return entry.grid.table.is_even and entry.grid.scale_dtype in DTYPES


class FusedSnap:
    """Snaps the masters of one plan; compiled at the first call."""

    def __init__(self, plan: Plan) -> None:
        self._entries = [entry for entry in plan.on_grid if is_fusable(entry)]
        self._sizes = {e.name: e.grid.rotate for e in self._entries if e.grid and e.grid.rotate}
        self._rotated: dict[str, Tensor] = {}
        self._snapped: dict[str, Tensor] = {}
        self._snap: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None

    @torch.no_grad()
    def __call__(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> snapped weight of every fusable tensor, overwritten by the next call."""
        if self._snap is None and self._entries and masters[self._entries[0].name].is_cuda:
            self._entries = [entry for entry in self._entries if has_kernel(entry)]
        names = [entry.name for entry in self._entries]
        weights = {name: self._as_rounded(name, masters[name].detach()) for name in names}
        if not weights:
            return {}
        if self._snap is None:
            self._snap = self._made_for(weights)
            # Kept: allocating them anew costs more than writing them.
            self._snapped = {name: torch.empty_like(w) for name, w in weights.items()}
        self._snap(weights, self._snapped)
        for name in self._rotated:
            rotate_(self._snapped[name], self._sizes[name])
        return self._snapped

    def _as_rounded(self, name: str, w: Tensor) -> Tensor:
        """Rotated where the grid rotates, at the same address every time."""
        if name not in self._sizes:
            return w
        if name not in self._rotated:
            self._rotated[name] = torch.empty_like(w, memory_format=torch.contiguous_format)
        return rotate_(self._rotated[name].copy_(w), self._sizes[name])

    def _made_for(
        self, weights: Mapping[str, Tensor]
    ) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
        if next(iter(weights.values())).device.type != "cuda":
            return CompiledSnap(self._entries)
        from qat.quantize.triton_kernels import TritonSnap  # is there with CUDA only

        return TritonSnap(weights, self._entries)


class CompiledSnap:
    """Of one plan's tensors on a CPU; compiled once for all runs with such tensors on such grids.

    A compiler puts a maximum, the scale made of it and the rounding into one loop over a group.
    Where a scale takes more than that, the loop is several times slower than two: one for the
    scales, one for the rounding (benchmarks/snap.py).
    """

    def __init__(self, entries: list[Entry]) -> None:
        grids = {entry.name: entry.grid for entry in entries if entry.grid is not None}
        shapes = {entry.name: entry.shape for entry in entries}
        self._grids = grids
        self._scaled_first = [n for n in grids if not has_one_statistic(shapes[n], grids[n])]
        self._signed = [name for name in self._scaled_first if grids[name].table.scale_has_sign]

        def look(weights: Mapping[str, Tensor]) -> tuple[dict[str, Codings], Tensor]:
            return _look(weights, grids)

        def write(
            weights: Mapping[str, Tensor],
            into: Mapping[str, Tensor],
            codings: Mapping[str, Codings],
        ) -> None:
            _write(weights, into, codings, grids)

        key = tuple(grids.items()), tuple(shapes.values())
        self._look = compiled(("look", *key), lambda: look)
        self._write = compiled(("write", *key), lambda: write)

    def __call__(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        codings: dict[str, Codings] = {}
        tied: list[str] = []
        if self._scaled_first:
            codings, ends_apart = self._look({name: weights[name] for name in self._scaled_first})
            least = zip(self._signed, ends_apart.tolist(), strict=True)
            tied = [name for name, difference in least if difference == 0.0]
        self._write(weights, into, codings)
        for name in tied:
            _mend_ties(weights[name], into[name], self._grids[name])


def _look(
    weights: Mapping[str, Tensor], grids: Mapping[str, Grid]
) -> tuple[dict[str, Codings], Tensor]:
    """Codings by name; and (tensors,), of each whose scales have a sign, the least difference that
    there is between the magnitudes of a group's two ends, of groups that are not all 0. In one
    tensor: to read a number of each tensor takes as long as a tenth of the pass."""
    codings: dict[str, Codings] = {}
    ends_apart: list[Tensor] = []
    for name, w in weights.items():
        grid, tensor_scale = grids[name], None
        views = group_views(w, grid)
        found = [order_statistics(view, grid) for view in views]
        if grid.has_tensor_scale:
            largest = torch.stack([amax.amax() for (amax,) in found]).amax()
            tensor_scale = tensor_scale_of(largest, grid)
        if grid.table.scale_has_sign:
            apart = [torch.where(high > 0, high + low, 1.0).abs().amin() for low, high in found]
            ends_apart.append(torch.stack(apart).amin())
            found = [(torch.where(high > -low, high, low),) for low, high in found]
        codings[name] = [
            coding_from(ends, grid, view.size(-1), tensor_scale).to_apply(grid)
            for view, ends in zip(views, found, strict=True)
        ]
    return codings, torch.stack(ends_apart) if ends_apart else torch.empty(0)


def _write(
    weights: Mapping[str, Tensor],
    into: Mapping[str, Tensor],
    codings: Mapping[str, Codings],
    grids: Mapping[str, Grid],
) -> None:
    """Write every tensor's snapped weights; codings that are not given are made on the way."""
    for name, w in weights.items():
        grid, snapped = grids[name], []
        for i, view in enumerate(group_views(w, grid)):
            if name in codings:
                coding = codings[name][i]
            else:
                coding = coding_from(order_statistics(view, grid), grid, view.size(-1))
            code = encode_view(view, grid, coding)
            snapped.append(decode_view(code, grid, coding.decoding_scale, coding.decoding_zero))
        into[name].copy_(join_groups(snapped, w.shape))


def _mend_ties(w: Tensor, into: Tensor, grid: Grid) -> None:
    """Of two weights of largest magnitude the first decides the sign, and maxima lose its place:
    snap such groups again."""
    a_row_each = replace(grid, group_size=None, per_tensor=False)
    for view, snapped in zip(group_views(w, grid), group_views(into, grid), strict=True):
        is_tied = view.amax(-1) == -view.amin(-1)
        snapped[is_tied] = snap(view[is_tied], a_row_each)
