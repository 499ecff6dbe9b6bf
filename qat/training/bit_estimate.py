"""Estimated bits of a file, and how they change with weights and steps: the loss's second term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qat.artifact.rate import classes_of, costs_by_class, count_codes, entropy_bits, slopes
from qat.quantize.gradients import sum_per_step
from qat.quantize.grid import DTYPES
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import products_in_step_units, round_to_codes
from qat.training.priced_steps import widen_rows

Tensors = Mapping[str, Tensor]


class Look(NamedTuple):
    """A tensor in units of its steps (rows, columns), its codes, their classes; its steps."""

    x: Tensor
    codes: Tensor
    classes: Tensor
    steps: Tensor


class BitEstimate:
    """``pulls`` and ``step_pulls``: d bits / d weight and, scaled as LSQ scales, / d step, by name.

    Steps and tensors that stay floats count as they are: what coding saves of steps is about what
    it has to say about rows and columns.
    """

    def __init__(self, plan: Plan) -> None:
        self.entries: list[Entry] = plan.on_grid
        self.side_bits = 8 * plan.packed_bytes - sum(
            entry.num_elements * entry.grid.code_bits for entry in self.entries if entry.grid
        )
        self.pulls: dict[str, Tensor] = {}
        self.step_pulls: dict[str, Tensor] = {}

    def of_counts(self, counts: Tensor) -> float:
        """Bits of a file whose codes are counted in (CLASSES, SYMBOLS)."""
        return self.side_bits + entropy_bits(counts)

    @torch.no_grad()
    def measure(self, masters: Tensors, steps: Tensors) -> float:
        """Bits of the file; finds the pulls anew. Steps are widened where a weight has no code."""
        seen = {entry.name: self._look(entry, masters, steps) for entry in self.entries}
        counts = torch.stack([count_codes(look.codes, look.classes) for look in seen.values()])
        costs = costs_by_class(counts.sum(0))
        for entry in self.entries:
            x, _, classes, stored = seen[entry.name]
            assert entry.grid is not None
            pull = products_in_step_units(slopes(x, classes, costs), stored)
            self.pulls[entry.name] = pull.view(entry.shape)
            self.step_pulls[entry.name] = sum_per_step(-pull * x, entry.grid, steps[entry.name])
        return self.of_counts(counts.sum(0))

    def _look(self, entry: Entry, masters: Tensors, steps: Tensors) -> Look:
        assert entry.grid is not None
        w, own = masters[entry.name].detach(), steps[entry.name]
        widen_rows(entry, w, own)
        stored = own.detach().to(DTYPES[entry.grid.step_dtype]).float()
        x = products_in_step_units(w, stored)
        codes = round_to_codes(x, entry.grid).to(torch.int8)
        return Look(x, codes, classes_of(codes), stored)
