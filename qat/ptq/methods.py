"""Ways to find the codes of one matrix, given its grid: what differs between variants.

GPTQ may count bits too. What a bit is worth is said by the scales: where they were chosen at a
price of bits, an error of scale ** 2 * ln 2 / 6 costs as much as a bit
(``qat.budget.priced_scales``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qat.artifact.bit_cost import classes_of, costs_by_class, count_codes
from qat.ptq.awq import awq
from qat.ptq.gptq import BitPrices, GptqFactor, rotated_hessian
from qat.ptq.layer_inputs import LayerInputs
from qat.quantize.grid import Grid
from qat.quantize.plan import NONE_LEARNED, Encoded, Entry, Plan, Scales
from qat.quantize.rounding import Codes, decode, encode, rotated, weighted_scales

LITE_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # GPTQ-lite's candidates

# Entry, weights, given or learned scales if any -> codes of a matrix, and its grid
Method = Callable[[Entry, Tensor, Tensor | None], tuple[Entry, Codes]]


def encoded_by(
    plan: Plan, weights: Mapping[str, Tensor], method: Method, scales: Scales = NONE_LEARNED
) -> list[Encoded]:
    """Every tensor as a file stores it: matrices by ``method``, the others as the plan says."""
    found = []
    for item in plan.encode(weights, scales):
        name = item.entry.name
        if item.entry.grid is not None:
            entry, codes = method(item.entry, weights[name], scales.get(name))
            item = Encoded(entry, codes.cpu())
        found.append(item)
    return found


def nearest(entry: Entry, w: Tensor, scales: Tensor | None) -> tuple[Entry, Codes]:
    """Rounding to nearest; without scales by the grid's own rule."""
    assert entry.grid is not None
    return entry, encode(w, entry.grid, scales)


def lite(entry: Entry, w: Tensor, _: Tensor | None) -> tuple[Entry, Codes]:
    """GPTQ-lite: of each row the percentile clip with the least squared error."""
    assert entry.grid is not None
    best, least = None, None
    for percentile in LITE_PERCENTILES:
        codes = encode(w, replace(entry.grid, scale_rule="percentile", percentile=percentile))
        error = (decode(codes, entry.grid) - w).square().sum(1, keepdim=True)
        if best is None or least is None:
            best, least = codes.scales, error
        is_less = error < least
        best, least = torch.where(is_less, codes.scales, best), error.minimum(least)
    assert best is not None
    return entry, encode(w, entry.grid, best.float())


def gptq(
    inputs: LayerInputs,
    act_order: bool = True,
    by_inputs: bool = True,
    bit_price: float = 0.0,
) -> Method:
    """Full-Hessian GPTQ; with ``by_inputs`` scales that are not given minimise the error weighted
    by the inputs' mean squares. ``bit_price``: of what a row's scales say that a bit is worth. What
    multiplies nothing, as an untied embedding, is rounded to nearest."""
    # Of the last sums seen: matrices that share them follow each other, and the factors of all
    # would take several times the weights' memory.
    last: tuple[Tensor, int | None, GptqFactor] | None = None

    def method(entry: Entry, w: Tensor, scales: Tensor | None) -> tuple[Entry, Codes]:
        nonlocal last
        assert entry.grid is not None
        if entry.name not in inputs.of:
            return nearest(entry, w, scales)
        # Rotated weights read rotated inputs, on the grid of rotated weights.
        grid, w = entry.grid.unrotated, rotated(w, entry.grid)
        hessian = rotated_hessian(inputs.hessian(entry.name), entry.grid)
        shared = inputs.of[entry.name].products, entry.grid.rotate
        if last is None or last[0] is not shared[0] or last[1] != shared[1]:
            last = None  # freed before the next is made
            last = *shared, GptqFactor(hessian, act_order=act_order)
        if scales is None and by_inputs and grid.levels == "int" and not grid.per_tensor:
            scales = weighted_scales(w, grid, hessian.diagonal())
        counts_bits = bit_price and grid.levels == "int" and grid.range == "symmetric"
        prices_of = _bit_prices(grid, bit_price) if counts_bits else None
        return entry, last[2].quantize(w, grid, scales, prices_of)

    return method


def _bit_prices(grid: Grid, bit_price: float) -> Callable[[Codes, Tensor], BitPrices]:
    """By the tables of codes rounded to nearest; classes stay those of their places."""

    def prices_of(rounded: Codes, own_errors: Tensor) -> BitPrices:
        codes = rounded.codes
        classes = classes_of(codes)
        scales = decode(rounded._replace(codes=torch.ones_like(codes)), grid).double()
        worth = (scales.square() @ own_errors[:, None]) / codes.size(1) * (math.log(2) / 6)
        return BitPrices(costs_by_class(count_codes(codes, classes)), classes, bit_price * worth)

    return prices_of


def scaled(inputs: LayerInputs) -> Method:
    """AWQ, its scales stored as column scales; embedding and head rounded to nearest."""

    def method(entry: Entry, w: Tensor, _: Tensor | None) -> tuple[Entry, Codes]:
        assert entry.grid is not None
        if entry.name not in inputs.wiring.matrices or entry.name not in inputs.of:
            return nearest(entry, w, None)
        seen = inputs.of[entry.name]
        magnitude = seen.magnitudes / seen.count
        found = awq(w, inputs.hessian(entry.name), magnitude, entry.grid)
        return replace(entry, grid=found.grid), found.coded

    return method
