"""Training to a number of bytes: the price of a bit, and the steps that go with it.

The loss gains price * (estimated bits of all codes). What a price means for steps is known: where
rounding costs half the sum of sensitivity * step ** 2 / 12 and a doubled step saves a bit, the two
balance at

    step ** 2 = 12 * price / (ln 2 * sensitivity)

so the price alone says where all steps start (products of row and column factors, from squares of
the gradients before the switch), and when it changes by a factor, all steps move by its root.
Between these moves steps are learned, from the gradients of the loss and of the bits.

The price is what the controller adapts. Every few updates estimates say how far the codes are from
the limit; a few files really encoded say by how much estimates are wrong. All of it is on the
clock. Time for the last encodings is kept back: after the last update the price makes its last
moves, of fractions of a per cent, until the file lies in [``WINDOW``, 1] * limit.

Bits and how they change with weights and steps are measured every ``EVERY`` updates and kept
between: they change slowly, and measuring them costs as much as snapping.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.artifact.rate import bits_of_codes, rate_of
from qat.quantize.gradients import sum_per_step
from qat.quantize.grid import DTYPES
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import products_in_step_units, round_to_codes

log = logging.getLogger("qat")
WINDOW = 0.999  # least share of the limit that counts as filled
EVERY = 4  # updates between estimates
DECAY = 0.9  # of the mean of squared gradients
FLOOR = 0.01  # of a tensor's mean sensitivity: few batches prove nothing to be without effect
REAL_AT = (0.33, 0.66, 0.9)  # of the time from the switch on: files really encoded
LOG2_PRICES, BISECTIONS, SAMPLE = (-60.0, 0.0), 14, 4  # every fourth row, to begin with
MOST_MOVE = 1.0  # of log2(price), at once
LANDINGS, KEPT_BACK = 8, 3  # encodings after the last update: at most, and those with time kept
STATE = (
    "price", "ratio", "file_seconds", "updates", "real_left", "squares", "squares_weight", "pulls",
    "step_pulls",
)  # fmt: skip
Tensors = Mapping[str, Tensor]


class File(NamedTuple):
    """What encoding says: size, and the seconds that it took."""

    num_bytes: int
    seconds: float


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
        self.limit_bytes, self.tokens_per_update = limit_bytes, tokens_per_update
        self.encode_file = encode_file
        self.is_adapted = price is None
        self.price = price or 0.0
        self.ratio = 1.0  # bits of the file / estimated bits of its codes
        self.file_seconds = 0.0
        self.updates = 0  # since the switch
        self.real_left = list(REAL_AT)
        self.squares: dict[str, Tensor] = {}  # mean of squared gradients before the switch
        self.squares_weight = 0.0  # sum of the weights of that mean
        self.pulls: dict[str, Tensor] = {}  # d bits / d weight
        self.step_pulls: dict[str, Tensor] = {}  # d bits / d step, scaled as LSQ scales

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        for name, value in state.items():
            if isinstance(value, dict):
                value = {key: tensor.to(device) for key, tensor in value.items()}
            setattr(self, name, value)

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
        factors = {entry.name: self._factors(entry, masters[entry.name]) for entry in self.entries}
        self.squares.clear()
        if self.is_adapted:
            low, high = LOG2_PRICES
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                scale = math.sqrt(2.0**middle)
                bits = SAMPLE * sum(
                    _sampled_bits(entry, masters[entry.name], factors[entry.name], scale)
                    for entry in self.entries
                )
                low, high = (middle, high) if bits > 8 * self.limit_bytes else (low, middle)
            self.price = 2.0**high
        steps = {e.name: _zoomed(factors[e.name], math.sqrt(self.price), e.num_rows)
                 for e in self.entries}  # fmt: skip
        for entry in self.entries:
            _unclip(entry, masters[entry.name], steps[entry.name])
        if self.is_adapted:
            self._encode_and_move(masters, steps)
            log.info(
                "train to bytes: price %.2e nats per bit, %.2f s an encoding",
                self.price, self.file_seconds,
            )  # fmt: skip
        return steps

    def _factors(self, entry: Entry, w: Tensor) -> Tensor:
        """Steps (rows + columns, 1) at a price of 1. Without gradients seen: a tensor's std."""
        if not self.squares:
            spread = w.std(correction=0).expand(entry.num_rows, 1)
            return torch.cat([spread, torch.ones_like(w.reshape(entry.num_rows, -1)[:1]).T])
        matrix = self.squares[entry.name].reshape(entry.num_rows, -1)
        matrix = matrix * (self.tokens_per_update / self.squares_weight)
        matrix = matrix + (FLOOR * matrix.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        row = matrix.mean(1, keepdim=True)
        column = (matrix / row).mean(0, keepdim=True)
        at_mean = column.log().mean().exp()  # columns around 1, so that bf16 suits both
        return torch.cat([(12 / math.log(2) / (row * at_mean)).sqrt(), (at_mean / column).sqrt().T])

    @torch.no_grad()
    def add_gradients(self, masters: Tensors, steps: Tensors) -> None:
        """Beside the loss's, before an update with QAT on; now and then the price moves."""
        if self.updates % EVERY == 0:
            bits = self.ratio * self.measure(masters, steps)
            if self.is_adapted:
                self._move_to_limit(bits, steps)
        for entry in self.entries:
            gradient, step_gradient = masters[entry.name].grad, steps[entry.name].grad
            assert gradient is not None
            assert step_gradient is not None
            gradient.add_(self.pulls[entry.name], alpha=self.price)
            step_gradient.add_(self.step_pulls[entry.name], alpha=self.price)
        self.updates += 1

    def measure(self, masters: Tensors, steps: Tensors) -> float:
        """Estimated bits of all codes; keeps how they change with weights and steps."""
        total = 0.0
        for entry in self.entries:
            assert entry.grid is not None
            w = masters[entry.name]
            _unclip(entry, w, steps[entry.name])
            stored = _as_stored(entry, steps[entry.name])
            x = products_in_step_units(w, stored)
            rate = rate_of(x, round_to_codes(x, entry.grid).to(torch.int8))
            pull = products_in_step_units(rate.slope, stored)
            self.pulls[entry.name] = pull.view_as(w)
            self.step_pulls[entry.name] = sum_per_step(-pull * x, entry.grid, steps[entry.name])
            total += rate.bits
        return total

    @torch.no_grad()
    def follow(self, masters: Tensors, steps: Tensors, done: float) -> None:
        """After an update: is it time to encode? ``done``: share of the time from the switch on."""
        if self.is_adapted and self.real_left and done >= self.real_left[0]:
            self.real_left.pop(0)
            self._encode_and_move(masters, steps)

    def _encode_and_move(self, masters: Tensors, steps: Tensors) -> None:
        file = self.encode_file(masters, steps)
        self.file_seconds = file.seconds
        self.ratio = 8 * file.num_bytes / self.measure(masters, steps)
        self._move_to_limit(8 * file.num_bytes, steps)

    def _move_to_limit(self, bits: float, steps: Tensors, slope: float = -0.5) -> None:
        """Change the price by what the codes have too many bits; ``slope``: bits per weight and
        log2(price). Half a bit where steps are fine, less where most codes are 0."""
        aim = 8 * self.limit_bytes * (1 + WINDOW) / 2
        change = (aim - bits) / (self.num_weights * slope)
        change = min(max(change, -MOST_MOVE), MOST_MOVE)
        self.price *= 2.0**change
        for entry in self.entries:
            steps[entry.name][: entry.num_rows].mul_(2.0 ** (change / 2))

    @torch.no_grad()
    def land(self, masters: Tensors, steps: Tensors) -> None:
        """After the last update: move until the file is in the window, and never above the limit.

        Says so where it is not.
        """
        if not self.is_adapted:
            return
        least, best = WINDOW * self.limit_bytes, None
        slope, before = -0.5, None
        for _ in range(LANDINGS):
            num_bytes = self.encode_file(masters, steps).num_bytes
            if num_bytes <= self.limit_bytes and (best is None or num_bytes > best[0]):
                best = num_bytes, {name: step.clone() for name, step in steps.items()}
            if least <= num_bytes <= self.limit_bytes:
                break
            if before is not None and self.price != before[1]:
                moved = math.log2(self.price / before[1])
                measured = 8 * (num_bytes - before[0]) / self.num_weights / moved
                slope = min(max(measured, -1.0), -0.05)
            before = num_bytes, self.price
            self._move_to_limit(8 * num_bytes, steps, slope)
        if best is None:
            log.warning("train to bytes: no file fits the limit")
            return
        for name, step in best[1].items():
            steps[name].copy_(step)
        if best[0] < least:
            log.warning(
                "train to bytes: ends at %.2f %% of the limit", 100 * best[0] / self.limit_bytes
            )


@torch.no_grad()
def _unclip(entry: Entry, w: Tensor, steps: Tensor) -> None:
    """Widen the steps of rows whose largest weight has no code: clipping costs more than bits."""
    assert entry.grid is not None
    by_column = w.detach().reshape(entry.num_rows, -1) / steps[entry.num_rows :].T
    needed = by_column.abs().amax(1, keepdim=True) / entry.grid.code_limits[1]
    rows = steps[: entry.num_rows]
    rows.copy_(rows.maximum(needed))


def _as_stored(entry: Entry, steps: Tensor) -> Tensor:
    assert entry.grid is not None
    return steps.to(DTYPES[entry.grid.step_dtype]).float()


def _zoomed(factors: Tensor, scale: float, num_rows: int) -> Tensor:
    """Products ``scale`` times as large, by the steps of the rows."""
    return torch.cat([scale * factors[:num_rows], factors[num_rows:]])


def _sampled_bits(entry: Entry, w: Tensor, factors: Tensor, scale: float) -> float:
    """Of every ``SAMPLE``-th row."""
    assert entry.grid is not None
    num_rows = entry.num_rows
    steps = _zoomed(factors, scale, num_rows)
    _unclip(entry, w, steps)
    rows = torch.cat([steps[:num_rows:SAMPLE], steps[num_rows:]])
    x = products_in_step_units(w.reshape(num_rows, -1)[::SAMPLE], rows)
    return bits_of_codes(round_to_codes(x, entry.grid).to(torch.int8))
