"""``Plan.snap`` for all tensors at once, with the same bits: what the training loop calls.

Three parts. ``look`` finds the order statistics of every group of every tensor, ``coding_from``
makes their few scales with plain torch, ``write`` rounds every tensor. The two big parts are
compiled on a CPU and Triton kernels on CUDA (triton_kernels.py); the small one must not be, because
compilers drop the scale's detour through its storage dtype, and 96 % of the weights change in the
last bit.

Fused are the grids whose bits do not depend on the order of work: scales from maxima and minima
(amax, exact percentile, power), and levels that a compiler rounds to as torch does; on CUDA whole
numbers alone, which the kernels are written for. Sums round differently when reordered, so the
other grids, and plain tensors, go through ``Entry.snap``. Where a grid rotates, plain torch rotates
before and after the passes, which see rotated weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.quantize.passes import (
    CompiledPasses,
    Found,
    GroupBatch,
    batches_of,
    has_kernel,
    is_fusable,
)
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import (
    DTYPES,
    Coding,
    coding_from,
    group_views,
    rotate_,
    signed_maximum,
    tensor_scale_of,
)

if TYPE_CHECKING:
    from qat.quantize.triton_kernels import TritonPasses


class FusedSnap:
    """Snaps the masters of one plan; compiled at the first call."""

    def __init__(self, plan: Plan) -> None:
        fusable = [entry for entry in plan.on_grid if is_fusable(entry)]
        self._sizes = {e.name: e.grid.rotate for e in fusable if e.grid and e.grid.rotate}
        self._take(fusable)
        self._rotated: dict[str, Tensor] = {}
        self._snapped: dict[str, Tensor] = {}
        self._passes: CompiledPasses | TritonPasses | None = None

    def _take(self, entries: list[Entry]) -> None:
        self._entries = entries
        self.names = [entry.name for entry in entries]
        self.batches = batches_of(entries)

    @torch.no_grad()
    def __call__(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> snapped weight of every fusable tensor, overwritten by the next call."""
        if self._passes is None and self.names and masters[self.names[0]].is_cuda:
            self._take([entry for entry in self._entries if has_kernel(entry)])
        weights = {name: self._as_rounded(name, masters[name].detach()) for name in self.names}
        if not weights:
            return {}
        if self._passes is None:
            self._passes = self._passes_for(weights)
            # Kept: allocating them anew costs more than writing them.
            self._snapped = {name: torch.empty_like(w) for name, w in weights.items()}
        found = [
            self._with_sign(weights, batch, ends) if batch.grid.table.scale_has_sign else ends
            for batch, ends in zip(self.batches, self._passes.look(weights), strict=True)
        ]
        scales = self._tensor_scales(found)
        codings = [
            self._coding(of_groups, batch, scale)
            for batch, of_groups, scale in zip(self.batches, found, scales, strict=True)
        ]
        self._passes.write(weights, codings, self._snapped)
        for name, size in self._sizes.items():
            if name in self._snapped:
                rotate_(self._snapped[name], size)
        return self._snapped

    def _as_rounded(self, name: str, w: Tensor) -> Tensor:
        """Rotated where the grid rotates, at the same address every time."""
        if name not in self._sizes:
            return w
        if name not in self._rotated:
            self._rotated[name] = torch.empty_like(w, memory_format=torch.contiguous_format)
        return rotate_(self._rotated[name].copy_(w), self._sizes[name])

    @staticmethod
    def _with_sign(weights: Mapping[str, Tensor], batch: GroupBatch, ends: Found) -> Found:
        def groups_at(places: Tensor) -> Tensor:
            views = [group_views(weights[name], batch.grid)[i] for name, i in batch.views]
            return torch.cat([view.flatten(0, -2) for view in views])[places]

        low, high = ends
        return (signed_maximum(low, high, groups_at),)

    def _coding(self, found: Found, batch: GroupBatch, tensor_scale: Tensor | None) -> Coding:
        is_byte = batch.grid.scale_dtype not in DTYPES
        if is_byte and isinstance(self._passes, CompiledPasses):
            return self._passes.coding(found, batch, tensor_scale)
        return coding_from(found, batch.grid, batch.columns, tensor_scale)

    def _tensor_scales(self, found: list[Found]) -> list[Tensor | None]:
        """For every group of a batch its tensor's scale, where scales are in units of one."""
        amax: dict[str, Tensor] = {}
        for batch, (largest, *_) in zip(self.batches, found, strict=True):
            if batch.grid.has_tensor_scale:
                for (name, _), own in zip(batch.views, largest.split(batch.counts), strict=True):
                    most = own.amax()
                    amax[name] = torch.maximum(amax.get(name, most), most)
        return [
            torch.cat(
                [
                    tensor_scale_of(amax[name], batch.grid).expand(count)
                    for (name, _), count in zip(batch.views, batch.counts, strict=True)
                ]
            )
            if batch.grid.has_tensor_scale
            else None
            for batch in self.batches
        ]

    def _passes_for(self, weights: dict[str, Tensor]) -> CompiledPasses | TritonPasses:
        if weights[self.names[0]].device.type != "cuda":
            return CompiledPasses(self.batches)
        from qat.quantize.triton_kernels import TritonPasses  # is there with CUDA only

        return TritonPasses(weights, self.batches)
