"""The budget solver: the plan that is predicted to lose least among those that fill the limit.

Every tensor has candidates with a predicted loss and an estimated size. For a price per bit the
best plan takes, tensor by tensor, the candidate of least loss + price * bits (Lagrange; Shoham and
Gersho 1988), so one bisection on the price finds the plan of a size. Sizes are then made real: the
chosen plan is encoded, the estimate rescaled, and the last tenths of a per cent come from zooming
the scales of all tensors together until the coded file lies in the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qat.budget.budget import Budget
from qat.budget.candidates import Choice, Cost, Stored, TrainedTensor
from qat.budget.search import Trial, fill

PRICE_RANGE = (1e-24, 1e2)  # nats per bit
BISECTIONS = 45  # fewer than would make the two prices around a size one number
CURVE_POINTS = 100
MARGIN = 1.1  # an estimate so much too large may still turn out to fit
ROUNDS = 4  # of estimating the whole plan's size again

SizeOf = Callable[[Sequence[Stored]], int]  # bytes of the file, really encoded


@dataclass(frozen=True)
class Solution:
    """What fills the budget. ``note`` says so where nothing does."""

    costs: list[Cost]  # estimates at zoom 1
    zoom: float
    stored: list[Stored]
    losses: list[float]  # predicted increase by each tensor as stored, nats per token
    num_bytes: int
    curve: list[tuple[int, float]]  # (estimated bytes, predicted increase of the loss)
    note: str | None = None

    @property
    def choices(self) -> list[Choice]:
        return [cost.choice for cost in self.costs]

    @property
    def predicted_loss(self) -> float:
        return sum(self.losses)


class Solver:
    """Candidates of all tensors, measured once; any number of budgets is solved with them."""

    def __init__(self, sources: Sequence[TrainedTensor], costs: Sequence[Sequence[Cost]]) -> None:
        self.sources, self.costs = sources, costs
        self._loss = [np.array([cost.loss for cost in of_one]) for of_one in costs]
        self._bits = [np.array([cost.bits for cost in of_one]) for of_one in costs]

    def _cheapest(self, price: float) -> list[Cost]:
        """Of each tensor the candidate of least loss + price * bits, the smaller of two equals."""
        chosen = []
        for costs, loss, bits in zip(self.costs, self._loss, self._bits, strict=True):
            total = loss + price * bits
            best = np.flatnonzero(total <= total.min())
            chosen.append(costs[best[bits[best].argmin()]])
        return chosen

    def _of_estimated_bits(self, bits: float) -> tuple[list[Cost], list[Cost]]:
        """The plans of least loss on both sides of ``bits``: not above, and the next one above."""
        low, high = np.log(PRICE_RANGE)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = _bits(self._cheapest(float(np.exp(middle)))) <= bits
            low, high = (low, middle) if fits else (middle, high)
        return self._cheapest(float(np.exp(high))), self._cheapest(float(np.exp(low)))

    def _stored(self, chosen: Sequence[Cost], zoom: float = 1.0) -> list[Stored]:
        pairs = zip(self.sources, chosen, strict=True)
        return [source.stored(cost.choice, zoom) for source, cost in pairs]

    def solve(self, budget: Budget, size_of: SizeOf) -> Solution:
        """Fill the budget; never go above it unless nothing in the family fits.

        ``size_of`` encodes; it is called some five times.
        """
        most = budget.artifact_bytes
        target = (budget.least_bytes + most) / 2
        finest, coarsest = self._cheapest(0.0), self._cheapest(PRICE_RANGE[1])
        bytes_per_bit = 1 / 8
        if _bits(finest) * bytes_per_bit <= MARGIN * most:
            size = size_of(self._stored(finest))
            bytes_per_bit = size / _bits(finest)
            if budget.holds(size):
                return self._done(finest, 1.0, size, bytes_per_bit, "the limit does not bind")
        chosen: list[Cost] = []
        above: list[Cost] = []
        size = 0
        for _ in range(ROUNDS):
            again, above = self._of_estimated_bits(target / bytes_per_bit)
            if again == chosen:
                break
            chosen, size = again, size_of(self._stored(again))
            bytes_per_bit = size / _bits(chosen)
            if budget.is_filled_by(size):
                return self._done(chosen, 1.0, size, bytes_per_bit)
        zoom, size = self._zoomed(chosen, size, most, size_of)
        if not budget.is_filled_by(size):
            # Scales as fine as 8 bits allow cannot fill what is left. Tensor by tensor the next
            # larger plan then goes over the limit, and coarser scales come back to it.
            larger = list(chosen)
            for number, cost in enumerate(above):
                larger[number] = cost
                if _bits(larger) * bytes_per_bit > target:
                    break
            size_above = size_of(self._stored(larger))
            from_above = self._zoomed(larger, size_above, most, size_of)
            if budget.holds(from_above[1]) and (size > most or from_above[1] > size):
                chosen, (zoom, size) = larger, from_above
        if not budget.holds(size):
            size = size_of(self._stored(coarsest))
            note = "nothing in the family is smaller"
            return self._done(coarsest, 1.0, size, bytes_per_bit, note)
        missed = (
            None if budget.is_filled_by(size) else "no plan of the family ends inside the window"
        )
        return self._done(chosen, zoom, size, bytes_per_bit, missed)

    def _zoomed(
        self, chosen: Sequence[Cost], size: int, budget_bytes: int, size_of: SizeOf
    ) -> tuple[float, int]:
        """Zoom all scales until the file is in the window: zoom and size of the best file."""
        num_weights = sum(
            source.entry.num_elements
            for source, cost in zip(self.sources, chosen, strict=True)
            if cost.choice.rule is not None
        )
        if num_weights == 0:
            return 1.0, size

        def trial_at(log2_zoom: float) -> Trial[int]:
            found = size_of(self._stored(chosen, 2.0**log2_zoom))
            return Trial(log2_zoom, found, found)

        best = fill(trial_at, Trial(0.0, size, size), num_weights / 8, budget_bytes)
        return 2.0**best.log2_zoom, best.made

    def _done(
        self,
        chosen: list[Cost],
        zoom: float,
        num_bytes: int,
        bytes_per_bit: float,
        note: str | None = None,
    ) -> Solution:
        stored = self._stored(chosen, zoom)
        pairs = zip(self.sources, stored, strict=True)
        losses = [source.loss_of(item) for source, item in pairs]
        curve = {}
        for price in np.geomspace(*PRICE_RANGE, CURVE_POINTS):
            plan = self._cheapest(float(price))
            curve[int(_bits(plan) * bytes_per_bit)] = sum(cost.loss for cost in plan)
        return Solution(chosen, zoom, stored, losses, num_bytes, sorted(curve.items()), note)


def _bits(costs: Sequence[Cost]) -> float:
    return sum(cost.bits for cost in costs)
