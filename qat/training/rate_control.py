"""Training to a number of bytes: the price of a bit, adapted until the file has the size asked for.

The loss gains price * (estimated bits of the file). At the switch the price alone says where all
steps start (``qat.training.priced_steps``); when it changes by a factor, all steps move by its
root. Between these moves steps are learned, from the gradients of the loss and of the bits.

The price is what the controller adapts. Every few updates an estimate says how far the file is from
the limit, and files really encoded say by how much estimates are wrong. All of it is on the clock.
Time for the last encodings is kept back: after the last update the price makes its last moves, of
fractions of a per cent, until the file lies in [``WINDOW``, 1] * limit.

Bits and how they change (``qat.training.bit_estimate``) are measured every ``EVERY`` updates and
kept between: they change slowly, and measuring them costs as much as snapping.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.artifact.budget import WINDOW
from qat.quantize.plan import Entry, Plan
from qat.training.bit_estimate import BitEstimate
from qat.training.priced_steps import (
    sampled_counts,
    steps_at,
    steps_at_price_one,
    zoom_rows,
)

log = logging.getLogger("qat")
EVERY = 4  # updates between estimates
DECAY = 0.9  # of the mean of squared gradients
REAL_AT = (0.5,)  # of the time from the switch on: a file is really encoded
LOG2_PRICES, TRIALS, ROUGHLY = (-60.0, 0.0), 14, 2e-3  # of the limit, by estimate
MOST_MOVE = 1.0  # of log2(price), at once
FINE, MOST, LEAST = -0.5, -1.0, -0.05  # bits of a weight per octave of the price, and their range
LANDINGS, KEPT_BACK = 12, 2  # encodings after the last update: at most, and those with time kept
A_SLOPE = 0.02  # of log2(price): smaller moves are lost in the digits of steps
PAST = 0.02  # of log2(price), where a landing is stuck
NEAR = 1e-4  # of the limit, by estimate: near enough to encode again
STATE = ("price", "ratio", "file_seconds", "updates", "real_left", "squares", "squares_weight")
PULLS = ("pulls", "step_pulls")
Tensors = Mapping[str, Tensor]


class File(NamedTuple):
    """What encoding says: size, and the seconds that it took."""

    num_bytes: int
    seconds: float


class Landing(NamedTuple):
    """Steps, and the size of their file."""

    num_bytes: int
    steps: dict[str, Tensor]


class RateControl:
    """``encode_file``: masters and steps -> File, the same on every rank.

    ``price``: nats per token and bit; None: the one that ends at ``limit_bytes``.
    """

    def __init__(
        self,
        plan: Plan,
        limit_bytes: int,
        tokens_per_update: int,
        encode_file: Callable[[Tensors, Tensors], File],
        price: float | None,
    ) -> None:
        self.entries: list[Entry] = plan.on_grid
        self.num_weights = sum(entry.num_elements for entry in self.entries)
        self.estimate = BitEstimate(plan)
        self.limit_bytes, self.tokens_per_update = limit_bytes, tokens_per_update
        self.encode_file = encode_file
        self.is_adapted = price is None
        self.price = price or 0.0
        self.ratio = 1.0  # bits of the file / estimated ones
        self.file_seconds = 0.0
        self.updates = 0  # since the switch
        self.real_left = list(REAL_AT)
        self.squares: dict[str, Tensor] = {}  # mean of squared gradients before the switch
        self.squares_weight = 0.0  # sum of the weights of that mean

    def prime(self, masters: Tensors) -> None:
        """Off the clock: what encoding compiles, and how long it takes."""
        if self.is_adapted:
            for _ in range(2):
                self.file_seconds = self.encode_file(masters, {}).seconds

    def state(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in STATE}
        return own | {name: getattr(self.estimate, name) for name in PULLS}

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        for name, value in state.items():
            if isinstance(value, dict):
                value = {key: tensor.to(device) for key, tensor in value.items()}
            setattr(self.estimate if name in PULLS else self, name, value)

    @property
    def kept_seconds(self) -> float:
        """What the clock keeps for the last encodings."""
        return KEPT_BACK * self.file_seconds if self.is_adapted else 0.0

    @torch.no_grad()
    def observe(self, masters: Tensors) -> None:
        """Before the switch, with gradients in place: which weights the loss is sensitive to."""
        self.squares_weight = DECAY * self.squares_weight + 1 - DECAY
        for entry in self.entries:
            gradient = masters[entry.name].grad
            assert gradient is not None
            if entry.name not in self.squares:
                self.squares[entry.name] = torch.zeros_like(gradient)
            self.squares[entry.name].mul_(DECAY).addcmul_(gradient, gradient, value=1 - DECAY)

    @torch.no_grad()
    def first_steps(self, masters: Tensors) -> dict[str, Tensor]:
        """At the switch: steps (rows + columns, 1) at the price that ends at the limit."""
        at_price_one = {
            e.name: steps_at_price_one(e, masters[e.name], self._sensitivity(e.name))
            for e in self.entries
        }
        self.squares.clear()
        if self.is_adapted:
            self.price = self._price_of_limit(masters, at_price_one)
        steps = {
            e.name: steps_at(self.price, e, masters[e.name], at_price_one[e.name])
            for e in self.entries
        }
        log.info(
            "train to bytes: price %.2e nats per bit, %.2f s an encoding",
            self.price, self.file_seconds,
        )  # fmt: skip
        return steps

    def _price_of_limit(self, masters: Tensors, at_price_one: Tensors) -> float:
        (low, high), at = LOG2_PRICES, sum(LOG2_PRICES) / 2
        for _ in range(TRIALS):
            counts = [
                sampled_counts(2.0**at, e, masters[e.name], at_price_one[e.name])
                for e in self.entries
            ]
            bits = self.estimate.of_counts(torch.stack(counts).sum(0))
            if abs(bits / self._aim - 1) < ROUGHLY:
                break
            low, high = (at, high) if bits > self._aim else (low, at)
            at += (self._aim - bits) / (self.num_weights * FINE)
            if not low < at < high:
                at = (low + high) / 2
        return 2.0**at

    def _sensitivity(self, name: str) -> Tensor | None:
        if name not in self.squares:
            return None
        return self.squares[name] * (self.tokens_per_update / self.squares_weight)

    @torch.no_grad()
    def add_gradients(self, masters: Tensors, steps: Tensors) -> None:
        """Beside the loss's, before an update with QAT on; now and then the price moves."""
        if self.updates % EVERY == 0:
            bits = self.ratio * self.estimate.measure(masters, steps)
            if self.is_adapted:
                self._move_to_limit(bits, masters, steps)
        for entry in self.entries:
            gradient, step_gradient = masters[entry.name].grad, steps[entry.name].grad
            assert gradient is not None
            assert step_gradient is not None
            gradient.add_(self.estimate.pulls[entry.name], alpha=self.price)
            step_gradient.add_(self.estimate.step_pulls[entry.name], alpha=self.price)
        self.updates += 1

    @torch.no_grad()
    def follow(self, masters: Tensors, steps: Tensors, done: float) -> None:
        """After an update: is it time to encode? ``done``: share of the time from the switch on."""
        if self.is_adapted and self.real_left and done >= self.real_left[0]:
            self.real_left.pop(0)
            self._encode_and_move(masters, steps)

    def _encode_and_move(self, masters: Tensors, steps: Tensors) -> None:
        file = self.encode_file(masters, steps)
        self.file_seconds = file.seconds
        self.ratio = 8 * file.num_bytes / self.estimate.measure(masters, steps)
        self._move_to_limit(8 * file.num_bytes, masters, steps)

    def _move_to_limit(
        self,
        bits: float,
        masters: Tensors,
        steps: Tensors,
        bits_per_octave: float = FINE,
    ) -> None:
        """Change the price by what the file has too many ``bits``."""
        change = (self._aim - bits) / (self.num_weights * bits_per_octave)
        change = min(max(change, -MOST_MOVE), MOST_MOVE)
        self._move_price(masters, steps, change)

    def _move_price(self, masters: Tensors, steps: Tensors, change: float) -> None:
        """By ``change`` of log2(price), and all steps by its root."""
        self.price *= 2.0**change
        for entry in self.entries:
            zoom_rows(entry, masters[entry.name], steps[entry.name], 2.0 ** (change / 2))

    @property
    def _aim(self) -> float:
        return 8 * self.limit_bytes * (1 + WINDOW) / 2

    @torch.no_grad()
    def land(self, masters: Tensors, steps: Tensors) -> None:
        """After the last update: move until the file is in the window, and never above the limit.

        Says so where it is not.
        """
        if not self.is_adapted:
            return
        below: Landing | None = None
        above: Landing | None = None
        self._land_by_estimates(masters, steps)
        for landing in range(LANDINGS):
            num_bytes = self.encode_file(masters, steps).num_bytes
            here = Landing(num_bytes, {name: step.detach().clone() for name, step in steps.items()})
            if num_bytes <= self.limit_bytes:
                below = here if below is None or num_bytes > below.num_bytes else below
            else:
                above = here if above is None or num_bytes < above.num_bytes else above
            if below is not None and below.num_bytes >= WINDOW * self.limit_bytes:
                break
            if landing >= KEPT_BACK and below is not None and above is not None:
                self._land_between(below, above, steps)
            elif landing >= KEPT_BACK:  # estimates stay on one side of the limit: go past it
                self._move_price(masters, steps, PAST if below is None else -PAST)
            else:
                self.ratio = 8 * num_bytes / self.estimate.measure(masters, steps)
                self._land_by_estimates(masters, steps)
        if below is None:
            log.warning("train to bytes: no file fits the limit")
            return
        for name, step in below.steps.items():
            steps[name].copy_(step)
        share = below.num_bytes / self.limit_bytes
        if share < WINDOW:
            log.warning(
                "train to bytes: ends at %.2f %% of the limit; codes of 8 bits are no finer",
                100 * share,
            )

    def _land_between(self, below: Landing, above: Landing, steps: Tensors) -> None:
        """Some rows as in one, the others as in the other: what the digits of steps leave open."""
        share = (self._aim / 8 - below.num_bytes) / (above.num_bytes - below.num_bytes)
        for entry in self.entries:
            less, more = below.steps[entry.name], above.steps[entry.name]
            differs = (less != more)[:, 0]
            first = differs.cumsum(0) <= math.ceil(share * int(differs.sum()))
            steps[entry.name].copy_(torch.where((differs & first)[:, None], more, less))

    def _land_by_estimates(self, masters: Tensors, steps: Tensors) -> None:
        slope, bits = FINE, self.ratio * self.estimate.measure(masters, steps)
        for _ in range(LANDINGS):
            price = self.price
            self._move_to_limit(bits, masters, steps, slope)
            before, bits = bits, self.ratio * self.estimate.measure(masters, steps)
            if abs(bits / self._aim - 1) < NEAR:
                return
            moved = math.log2(self.price / price)
            if abs(moved) > A_SLOPE:
                slope = min(max((bits - before) / self.num_weights / moved, MOST), LEAST)
