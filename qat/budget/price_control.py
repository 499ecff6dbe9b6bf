"""Training to a number of bytes: the price of a bit, adapted until the file has the size asked for.

The loss gains price * (estimated bits of the file). At the switch the price alone says where all
scales start (``qat.budget.priced_scales``); when it changes by a factor, all scales move by its
root. Between these moves scales are learned, from the gradients of the loss and of the bits.

The price is what the controller adapts. Every few updates an estimate says how far the file is from
the limit, and files really encoded say by how much estimates are wrong. All of it is on the clock.
Time for the last encodings is kept back: after the last update all scales are zoomed by fractions
of a per cent, until the file lies in [``WINDOW``, 1] * limit.

Bits and how they change (``qat.budget.bit_estimate``) are measured every ``EVERY`` updates and
kept between: they change slowly, and measuring them costs as much as snapping.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.artifact.bit_cost import entropy_bits
from qat.budget.bit_estimate import BitEstimate
from qat.budget.budget import WINDOW, Budget
from qat.budget.priced_scales import (
    sampled_counts,
    scales_at,
    scales_at_price_one,
    uneven,
    zoom_rows,
)
from qat.budget.search import Trial, fill
from qat.errors import TrainingError
from qat.quantize.plan import Entry, Plan

log = logging.getLogger("qat")

EVERY = 4  # updates between estimates
DECAY = 0.9  # of the mean of squared gradients
REAL_AT = (0.5,)  # of the time from the switch on: a file is really encoded
FIRST_LOG2_PRICE, REACH = -30.0, 15.0  # octaves of scales, either way: half as many of prices
ROUGHLY, FINELY = 0.998, 0.9999  # windows of estimates: of the first price, of the landing
MOST_MOVE = 1.0  # of log2(price), at once
BITS_PER_OCTAVE = -0.5  # of a weight, as its price doubles; at most, and less at few bits
PROBE = 0.05  # octaves of scales that show how many bytes an octave is
KEPT_BACK = 2  # encodings after the last update for which time is kept
STATE = ("price", "ratio", "file_seconds", "updates", "real_left", "squares", "squares_weight")
PULLS = ("pulls", "scale_pulls")

Tensors = Mapping[str, Tensor]


class File(NamedTuple):
    """What encoding says: size, and the seconds that it took."""

    num_bytes: int
    seconds: float


class PriceControl:
    """``encode_file``: masters and scales -> File, the same on every rank.

    ``price``: nats per token and bit; None: the one that fills the budget.
    """

    def __init__(
        self,
        plan: Plan,
        budget: Budget,
        tokens_per_update: int,
        encode_file: Callable[[Tensors, Tensors], File],
        price: float | None,
    ) -> None:
        self.entries: list[Entry] = plan.on_grid
        self.num_weights = sum(entry.num_elements for entry in self.entries)
        self.estimate = BitEstimate(plan)
        self.budget, self.tokens_per_update = budget, tokens_per_update
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
        """Off the clock: what encoding compiles, and, if not known yet, how long it takes."""
        if not self.is_adapted:
            return
        self.encode_file(masters, {})
        if self.file_seconds == 0.0:
            self.file_seconds = self.encode_file(masters, {}).seconds

    def state(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in STATE}
        return own | {name: getattr(self.estimate, name) for name in PULLS}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            if name != "price" or self.is_adapted:  # a given one is that of this run's settings
                setattr(self.estimate if name in PULLS else self, name, value)

    def to(self, device: torch.device) -> None:
        """Its tensors where the masters are."""
        for holder, name in ((self, "squares"), *((self.estimate, name) for name in PULLS)):
            found = getattr(holder, name)
            setattr(holder, name, {key: tensor.to(device) for key, tensor in found.items()})

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
    def first_scales(self, masters: Tensors) -> dict[str, Tensor]:
        """At the switch, after an update at least: scales (rows + columns, 1) at the price that
        ends at the limit. TrainingError names a matrix that had no gradient yet."""
        for name, squares in self.squares.items():
            if not squares.any():
                raise TrainingError(
                    f"qat.to_bytes: no gradient reached {name} before the switch, so what it is "
                    "worth is unknown; start QAT later, or lower the learning rates if it diverged"
                )
        at_price_one = {
            e.name: scales_at_price_one(e, self._sensitivity(e.name)) for e in self.entries
        }
        self.squares.clear()
        if self.is_adapted:
            self.price = self._price_of_limit(masters, at_price_one)
        scales = {
            e.name: scales_at(self.price, e, masters[e.name], at_price_one[e.name])
            for e in self.entries
        }
        log.info(
            "train to bytes: price %.2e nats per bit, %.2f s an encoding",
            self.price, self.file_seconds,
        )  # fmt: skip
        return scales

    def _price_of_limit(self, masters: Tensors, at_price_one: Tensors) -> float:
        float_bits = self.estimate.bits_of_floats(masters)

        def trial_at(log2_zoom: float) -> Trial[float]:
            price = 2.0 ** (FIRST_LOG2_PRICE + 2 * log2_zoom)
            counts = [
                sampled_counts(price, e, masters[e.name], at_price_one[e.name])
                for e in self.entries
            ]
            bits = float_bits + entropy_bits(torch.stack(counts).sum(0))
            return Trial(log2_zoom, bits / 8, price)

        octave = self.num_weights / 8
        return fill(trial_at, trial_at(0.0), octave, self.budget.aim_bytes, ROUGHLY, REACH).made

    def _sensitivity(self, name: str) -> Tensor:
        return self.squares[name] * (self.tokens_per_update / self.squares_weight)

    @torch.no_grad()
    def add_gradients(self, masters: Tensors, scales: Tensors) -> None:
        """Beside the loss's, before an update with QAT on; now and then the price moves."""
        if self.updates % EVERY == 0:
            bits = self.estimate.measure(masters, scales)
            if self.is_adapted:
                self._move_to_limit(self.ratio * bits / 8, masters, scales)
        for entry in self.entries:
            gradient, scale_gradient = masters[entry.name].grad, scales[entry.name].grad
            assert gradient is not None
            assert scale_gradient is not None
            gradient.add_(self.estimate.pulls[entry.name], alpha=self.price)
            scale_gradient.add_(self.estimate.scale_pulls[entry.name], alpha=self.price)
        self.updates += 1

    @torch.no_grad()
    def follow(self, masters: Tensors, scales: Tensors, done: float) -> None:
        """After an update: is it time to encode? ``done``: share of the time from the switch on."""
        if self.is_adapted and self.real_left and done >= self.real_left[0]:
            self.real_left.pop(0)
            self._encode_and_move(masters, scales)

    def _encode_and_move(self, masters: Tensors, scales: Tensors) -> None:
        file = self.encode_file(masters, scales)
        self.file_seconds = file.seconds
        self.ratio = 8 * file.num_bytes / self.estimate.bits(masters, scales)
        self._move_to_limit(file.num_bytes, masters, scales)

    def _move_to_limit(self, num_bytes: float, masters: Tensors, scales: Tensors) -> None:
        """Change the price by what the file is too large, and all scales by the root of that."""
        change = 8 * (self.budget.aim_bytes - num_bytes) / (self.num_weights * BITS_PER_OCTAVE)
        change = min(max(change, -MOST_MOVE), MOST_MOVE)
        self.price *= 2.0**change
        for entry in self.entries:
            zoom_rows(entry, masters[entry.name], scales[entry.name], 2.0 ** (change / 2))

    @torch.no_grad()
    def land(self, masters: Tensors, scales: Tensors) -> None:
        """After the last update: zoom the scales until the file is in the window.

        Says so where it does not get there.
        """
        if not self.is_adapted:
            return
        trained = {name: scale.detach().clone() for name, scale in scales.items()}

        def zoomed(log2_zoom: float) -> dict[str, Tensor]:
            found = {name: scale.clone() for name, scale in trained.items()}
            for entry in self.entries:
                zoom = uneven(2.0**log2_zoom, entry.num_rows).to(found[entry.name].device)
                zoom_rows(entry, masters[entry.name], found[entry.name], zoom)
            return found

        def estimate_at(log2_zoom: float) -> Trial[None]:
            bits = self.estimate.bits(masters, zoomed(log2_zoom))
            return Trial(log2_zoom, self.ratio * bits / 8, None)

        def file_at(log2_zoom: float) -> Trial[dict[str, Tensor]]:
            found = zoomed(log2_zoom)
            return Trial(log2_zoom, self.encode_file(masters, found).num_bytes, found)

        start, octave = estimate_at(0.0), self.num_weights / 8
        place = fill(estimate_at, start, octave, self.budget.aim_bytes, FINELY).log2_zoom
        probes = [estimate_at(place + by).num_bytes for by in (-PROBE, PROBE)]
        octave = max((probes[0] - probes[1]) / (2 * PROBE), octave / 10)
        landed = fill(file_at, file_at(place), octave, self.budget.artifact_bytes)
        for name, scale in landed.made.items():
            scales[name].copy_(scale)
        share = landed.num_bytes / self.budget.artifact_bytes
        if share > 1:
            log.warning("train to bytes: no file fits the limit")
        elif share < WINDOW:
            log.warning(
                "train to bytes: ends at %.2f %% of the limit; codes of 8 bits are no finer",
                100 * share,
            )
