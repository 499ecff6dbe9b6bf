"""``Plan.snap`` for all tensors at once, with the same bits: what the training loop calls.

Three parts. ``look`` finds the order statistics of every group of every tensor, ``coding_from``
makes their few scales with plain torch, ``write`` rounds every tensor. The two big parts are
compiled on a CPU and Triton kernels on CUDA (triton_kernels.py); the small one must not be, because
compilers drop the scale's detour through its storage dtype, and 96 % of the weights change in the
last bit.

Fused are the grids whose bits do not depend on the order of work: int and ternary levels with a
scale from maxima and minima (amax, exact percentile). Sums round differently when reordered, so the
other grids, and plain tensors, go through ``Entry.snap``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.quantize.passes import CompiledPasses, batches_of, is_fusable
from qat.quantize.plan import Plan
from qat.quantize.rounding import (
    coding_from,
)

if TYPE_CHECKING:
    from qat.quantize.triton_kernels import TritonPasses


class FusedSnap:
    """Snaps the masters of one plan; compiled at the first call."""

    def __init__(self, plan: Plan) -> None:
        self.names = [entry.name for entry in plan.on_grid if is_fusable(entry)]
        self.batches = batches_of([plan.entries[name] for name in self.names])
        self._snapped: dict[str, Tensor] = {}
        self._passes: CompiledPasses | TritonPasses | None = None

    @torch.no_grad()
    def __call__(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> snapped weight of every fusable tensor, overwritten by the next call."""
        weights = {name: masters[name].detach() for name in self.names}
        if not weights:
            return {}
        if self._passes is None:
            self._passes = self._passes_for(weights)
            # Kept: allocating them anew costs more than writing them.
            self._snapped = {name: torch.empty_like(w) for name, w in weights.items()}
        codings = [
            coding_from(found, batch.grid, batch.columns)
            for batch, found in zip(self.batches, self._passes.look(weights), strict=True)
        ]
        self._passes.write(weights, codings, self._snapped)
        return self._snapped

    def _passes_for(self, weights: dict[str, Tensor]) -> CompiledPasses | TritonPasses:
        if weights[self.names[0]].device.type != "cuda":
            return CompiledPasses(self.batches)
        from qat.quantize.triton_kernels import TritonPasses  # is there with CUDA only

        return TritonPasses(weights, self.batches)
