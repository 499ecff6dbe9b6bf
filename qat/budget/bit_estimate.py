"""Estimated bits of a file, and how they change with weights and scales: the loss's second term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qat.artifact.bit_cost import (
    bits_of_floats,
    classes_of,
    costs_by_class,
    count_codes,
    entropy_bits,
    slopes,
)
from qat.budget.priced_scales import widen_rows
from qat.quantize.gradients.learned import sum_per_scale
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import DTYPES, products_in_scale_units, round_to_levels

Tensors = Mapping[str, Tensor]


class Look(NamedTuple):
    """A tensor in units of its scales (rows, columns), its codes, their classes; its scales."""

    x: Tensor
    codes: Tensor
    classes: Tensor
    scales: Tensor


class BitEstimate:
    """``pulls`` and ``scale_pulls``: d bits / d weight and, scaled as LSQ scales, / d scale, by
    name.

    Scales count as they are: what coding saves of them is about what a coder has to say about rows
    and columns.
    """

    def __init__(self, plan: Plan) -> None:
        self.entries: list[Entry] = plan.on_grid
        self.plain: list[Entry] = [entry for entry in plan if entry.grid is None]
        packed_codes = sum(e.num_elements * e.grid.table.bits for e in self.entries if e.grid)
        self.scale_bits = 8 * sum(entry.packed_bytes for entry in self.entries) - packed_codes
        self.pulls: dict[str, Tensor] = {}
        self.scale_pulls: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, masters: Tensors, scales: Tensors) -> float:
        """Bits of the file; finds the pulls anew. Scales are widened where a weight has no code."""
        seen = {entry.name: self._look(entry, masters, scales) for entry in self.entries}
        counts = _counts(seen)
        costs = costs_by_class(counts)
        for entry in self.entries:
            x, _, classes, stored = seen[entry.name]
            assert entry.grid is not None
            pull = products_in_scale_units(slopes(x, classes, costs), stored)
            self.pulls[entry.name] = pull.view(entry.shape)
            self.scale_pulls[entry.name] = sum_per_scale(-pull * x, entry.grid, scales[entry.name])
        return entropy_bits(counts) + self.bits_of_floats(masters)

    @torch.no_grad()
    def bits(self, masters: Tensors, scales: Tensors) -> float:
        """Bits of the file alone."""
        seen = {entry.name: self._look(entry, masters, scales) for entry in self.entries}
        return entropy_bits(_counts(seen)) + self.bits_of_floats(masters)

    def bits_of_floats(self, masters: Tensors) -> float:
        """Bits of scales, and of the tensors that stay floats."""
        plain = [masters[entry.name].detach().to(DTYPES[entry.dtype]) for entry in self.plain]
        return self.scale_bits + bits_of_floats(plain)

    def _look(self, entry: Entry, masters: Tensors, scales: Tensors) -> Look:
        assert entry.grid is not None
        w, own = masters[entry.name].detach(), scales[entry.name]
        widen_rows(entry, w, own)
        stored = own.detach().to(DTYPES[entry.grid.scale_dtype]).float()
        x = products_in_scale_units(w, stored)
        codes = round_to_levels(x, entry.grid).to(torch.int8)
        return Look(x, codes, classes_of(codes), stored)


def _counts(seen: Mapping[str, Look]) -> Tensor:
    return torch.stack([count_codes(look.codes, look.classes) for look in seen.values()]).sum(0)
