"""The scales that go with a price of bits: products of a factor per row and one per column.

Where rounding costs half the sum of sensitivity * scale ** 2 / 12 and a doubled scale saves a bit,
the two balance at

    scale ** 2 = 12 * price / (ln 2 * sensitivity)

so a price in nats per token and bit says where all scales of a model stand. Sensitivities are means
of squared gradients; their rows and columns give the factors. What it cannot see is that codes end
at 127: a weight beyond loses more than any bit is worth, most of all where scales are fine because
the weight matters. So columns are widened until nine in ten of their weights have a code, then rows
until all have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.artifact.bit_cost import classes_of, count_codes
from qat.quantize.plan import Entry
from qat.quantize.rounding import products_in_scale_units, quotient, round_to_levels

SENSITIVITY_FLOOR = 0.01  # of the tensor's mean: few batches prove nothing to be without effect


def sensitivity_factors(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> (rows, 1) and (1, columns), whose product is near it; columns around 1."""
    least = torch.finfo(sensitivity.dtype).tiny
    matrix = sensitivity + (SENSITIVITY_FLOOR * sensitivity.mean()).clamp_min(least)
    row = matrix.mean(1, keepdim=True)
    column = (matrix / row).mean(0, keepdim=True)
    at_mean = column.log().mean().exp()
    return row * at_mean, column / at_mean


def least_row_scales(w: Tensor, column_scales: Tensor, largest_code: float) -> Tensor:
    """(rows, 1): the finest scales with which all weights (rows, columns) have a code.

    ``column_scales`` (1, columns).
    """
    return quotient((w / column_scales).abs().amax(1, keepdim=True), largest_code)


COLUMN_SHARE = 0.9  # of a column's weights that must have a code, else the column is widened
HEADROOM = 0.9  # of the largest code: weights grow between two looks at them
SAMPLE = 4  # every fourth row says enough of a column, and while a price is sought
DIGIT = 2.0**-7  # of a bf16 number: what its last digit is worth, at most


def scales_at_price_one(entry: Entry, sensitivity: Tensor) -> Tensor:
    """(rows + columns, 1) float32. ``sensitivity`` is of the weight's shape."""
    row, column = sensitivity_factors(sensitivity.reshape(entry.num_rows, -1))
    return torch.cat([(12 / math.log(2) / row).sqrt(), column.rsqrt().T])


def scales_at(price: float, entry: Entry, w: Tensor, at_price_one: Tensor) -> Tensor:
    """(rows + columns, 1), wide enough for every weight to have a code."""
    scales = at_price_one.clone()
    scales[: entry.num_rows] *= math.sqrt(price)
    _widen_columns(entry, w, scales)
    widen_rows(entry, w, scales)
    return scales


def sampled_counts(price: float, entry: Entry, w: Tensor, at_price_one: Tensor) -> Tensor:
    """(CLASSES, SYMBOLS) counts of a tensor's codes at a price, from some of its rows."""
    assert entry.grid is not None
    num_rows = entry.num_rows
    scales = scales_at(price, entry, w, at_price_one)
    some = torch.cat([scales[:num_rows:SAMPLE], scales[num_rows:]])
    matrix = w.reshape(num_rows, -1)[::SAMPLE]
    codes = round_to_levels(products_in_scale_units(matrix, some), entry.grid).to(torch.int8)
    return count_codes(codes, classes_of(codes)) * (num_rows / len(matrix))


def zoom_rows(entry: Entry, w: Tensor, scales: Tensor, zoom: float | Tensor) -> None:
    """In place: scales ``zoom`` times as large (a number, or (rows, 1)), if all keep a code."""
    scales[: entry.num_rows].mul_(zoom)
    widen_rows(entry, w, scales)


def uneven(zoom: float, num_rows: int) -> Tensor:
    """(rows, 1): ``zoom`` and up to a digit more, so that rows do not all round over at once."""
    return zoom * (1 + torch.linspace(0.0, DIGIT, num_rows)[:, None])


def widen_rows(entry: Entry, w: Tensor, scales: Tensor) -> None:
    """In place, rows whose largest weight has no code."""
    assert entry.grid is not None
    matrix = w.detach().reshape(entry.num_rows, -1)
    most = HEADROOM * entry.grid.table.limits[1]
    rows = scales[: entry.num_rows]
    rows.copy_(rows.maximum(least_row_scales(matrix, scales[entry.num_rows :].T, most)))


def _widen_columns(entry: Entry, w: Tensor, scales: Tensor) -> None:
    assert entry.grid is not None
    columns = scales[entry.num_rows :]
    some = slice(0, entry.num_rows, SAMPLE)
    sizes = (w.detach().reshape(entry.num_rows, -1)[some] / scales[some]).abs()
    place = max(math.ceil(COLUMN_SHARE * len(sizes)), 1)
    largest = sizes.kthvalue(place, 0).values[:, None]
    columns.copy_(columns.maximum(quotient(largest, HEADROOM * entry.grid.table.limits[1])))
