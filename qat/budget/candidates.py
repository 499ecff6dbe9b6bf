"""The ways in which a budget may store one tensor, and what each costs in loss and in bits.

    as planned   the run's own grid: after QAT the trained weights, at no loss
    plain        fp16
    sigma        scale = size * std(w) per row, per group of 64 or per tensor (SDClip, PR 1394);
                 rotated where the plan rotates
    product      scale = size * std(w) * row factor * column factor, sensitivity ** (-exponent / 2)
                 of rows and of columns: where an error costs more, scales are finer

Bit width is no choice: coded codes cost what their distribution costs, so each tensor gets the
fewest bits that hold its codes (at most 8). The loss is predicted to rise by half the sum of
sensitivity * error ** 2; rates are entropies of the codes in classes of equal expected magnitude
(row mean * column mean), which is what the ``mix`` coder is good at. The budget corrects them by
really encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from qat.artifact.bit_cost import bits_of_codes, bits_of_floats
from qat.budget.priced_scales import least_row_scales, sensitivity_factors
from qat.quantize.grid import Grid
from qat.quantize.levels.int import MAX_BITS, MIN_BITS
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import group_views, rotated

SIZES = tuple(2.0 ** (k / 3) for k in range(-15, 11))  # of a scale, in standard deviations
SMALLEST_ZOOM = 0.8  # that clips no code: bits that came and went would make sizes jump


class ScaleRule(NamedTuple):
    name: str
    group_size: int | None = None
    per_tensor: bool = False
    exponent: float | None = None  # of a product; None: sigma


SCALE_RULES = (
    ScaleRule("sigma per row"),
    ScaleRule("sigma per 64", group_size=64),
    ScaleRule("sigma per tensor", per_tensor=True),
    ScaleRule("product 0.75", exponent=0.75),
    ScaleRule("product 1", exponent=1.0),
)


class Choice(NamedTuple):
    """One way to store a tensor. ``rule`` None: as planned, or fp16 if ``plain``."""

    rule: ScaleRule | None
    size: float = 1.0  # of its scales, in standard deviations
    plain: bool = False

    @property
    def name(self) -> str:
        if self.rule is None:
            return "plain" if self.plain else "as planned"
        return self.rule.name


class Stored(NamedTuple):
    """A tensor as a choice stores it: its entry, what is encoded, and given scales if any."""

    entry: Entry
    weights: Tensor
    scales: Tensor | None = None

    def encode(self) -> Encoded:
        scales = {} if self.scales is None else {self.entry.name: self.scales}
        return Plan([self.entry]).encode({self.entry.name: self.weights}, scales)[0]


class Cost(NamedTuple):
    choice: Choice
    loss: float  # predicted increase, nats per token
    bits: float  # estimate


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor to store: as trained, and the weights that the model's loss was measured with.

    After QAT ``reference`` is the snapped tensor, else the same as ``trained``. ``sensitivity`` is
    the diagonal of the loss's Hessian, or an estimate of it.
    """

    entry: Entry
    trained: Tensor
    reference: Tensor
    sensitivity: Tensor
    scales: Tensor | None = None

    def stored(self, choice: Choice, zoom: float = 1.0) -> Stored:
        """The tensor as ``choice`` stores it, its scales ``zoom`` times as large."""
        entry, w = self.entry, self.reference
        if choice.rule is None:
            if choice.plain:
                return Stored(Entry(entry.name, entry.shape, None, "fp16"), w)
            return Stored(entry, self.trained, self.scales)
        if choice.rule.exponent is None:
            return self._by_sigma(choice.rule, choice.size, zoom)
        return self._by_product(choice.rule.exponent, choice.size, zoom)

    def _by_sigma(self, rule: ScaleRule, size: float, zoom: float) -> Stored:
        shape, largest_sigma = self._largest_sigmas[rule]
        bits = _bits_for(largest_sigma / size)
        sigma = float(f"{size * zoom * _largest_code(bits):.6g}")  # digits are bytes of the header
        grid = replace(shape, bits=bits, scale_rule="sigma", sigma=sigma)
        return Stored(Entry(self.entry.name, self.entry.shape, grid), self.reference)

    @cached_property
    def _largest_sigmas(self) -> dict[ScaleRule, tuple[Grid, float]]:
        """By rule its grid of most bits, and the largest weight in standard deviations of those
        that share its scale."""
        planned, found = self.entry.grid, {}
        for rule in (rule for rule in SCALE_RULES if rule.exponent is None):
            # One scale moves all codes of a tensor at once: it needs digits to end in the window.
            dtype = "fp32" if rule.per_tensor else "fp16"
            shape = Grid(
                bits=MAX_BITS, group_size=rule.group_size, per_tensor=rule.per_tensor,
                scale_dtype=dtype, rotate=None if planned is None else planned.rotate,
            )  # fmt: skip
            largest = 0.0
            for view in group_views(rotated(self.reference, shape), shape):
                sigmas = view.abs().amax(-1) / view.std(-1, correction=0)
                largest = max(largest, float(sigmas.nan_to_num(0.0).max()))
            found[rule] = shape, largest
        return found

    @cached_property
    def _log_sensitivity(self) -> tuple[Tensor, Tensor]:
        """Natural logarithms of the sensitivities of rows (R, 1) and columns (1, C), centred."""
        row, column = sensitivity_factors(self.sensitivity.reshape(self.entry.num_rows, -1))
        return row.log() - row.log().mean(), column.log()

    def _by_product(self, exponent: float, size: float, zoom: float) -> Stored:
        w = self.reference.reshape(self.entry.num_rows, -1)
        of_row, of_column = ((-0.5 * exponent * log).exp() for log in self._log_sensitivity)
        least = least_row_scales(w, of_column, _largest_code(MAX_BITS))
        row_scales = size * w.std(correction=0) * of_row
        largest_code = _largest_code(MAX_BITS) * (least / row_scales).nan_to_num(0.0).max()
        bits = _bits_for(float(largest_code))
        row_scales = (zoom * row_scales).maximum(least)
        grid = Grid(bits=bits, scale_rule="given", scale_dtype="bf16", column_scales=True)
        entry = Entry(self.entry.name, self.entry.shape, grid)
        return Stored(entry, w.view(self.entry.shape), torch.cat([row_scales, of_column.T]))

    def costs(self) -> list[Cost]:
        """Every choice with its predicted cost. ValueError if the tensor is not finite."""
        choices = [Choice(None), Choice(None, plain=True)]
        for rule in SCALE_RULES:
            choices += [Choice(rule, size) for size in SIZES]
        return [self._cost(choice) for choice in choices]

    def _cost(self, choice: Choice) -> Cost:
        encoded = self.stored(choice).encode()
        return Cost(choice, self._loss_of(encoded), _bits_of(encoded))

    def _loss_of(self, encoded: Encoded) -> float:
        error = encoded.decode() - self.reference
        return 0.5 * float((self.sensitivity * error.square_()).sum())

    def loss_of(self, stored: Stored) -> float:
        """Predicted increase of the loss, in nats per token."""
        return self._loss_of(stored.encode())


def _largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _bits_for(largest_code: float) -> int:
    """The fewest bits that hold a code of this size, however a plan is zoomed, or all."""
    needed = largest_code / SMALLEST_ZOOM
    fit = (b for b in range(MIN_BITS, MAX_BITS) if needed <= _largest_code(b))
    return next(fit, MAX_BITS)


def _bits_of(encoded: Encoded) -> float:
    bits = bits_of_floats(encoded.floats)
    if encoded.coded is None:
        return bits
    return bits + bits_of_codes(encoded.coded.codes.reshape(encoded.entry.num_rows, -1))
