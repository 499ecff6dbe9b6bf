"""The steps that go with a price of bits: products of a factor per row and one per column.

Where rounding costs half the sum of sensitivity * step ** 2 / 12 and a doubled step saves a bit,
the two balance at

    step ** 2 = 12 * price / (ln 2 * sensitivity)

so a price in nats per token and bit says where all steps of a model stand. Sensitivities are means
of squared gradients; their rows and columns give the factors. What it cannot see is that codes end
at 127: a weight beyond loses more than any bit is worth, most of all where steps are fine because
the weight matters. So columns are widened until nine in ten of their weights have a code, then rows
until all have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.artifact.rate import classes_of, count_codes
from qat.quantize.plan import Entry
from qat.quantize.rounding import products_in_step_units, round_to_codes

FLOOR = 0.01  # of a tensor's mean sensitivity: few batches prove nothing to be without effect
COLUMN_SHARE = 0.9  # of a column's weights that must have a code, else the column is widened
HEADROOM = 0.9  # of the largest code: weights grow between two looks at them
SAMPLE = 4  # every fourth row says enough of a column, and while a price is sought


def steps_at_price_one(entry: Entry, w: Tensor, sensitivity: Tensor | None) -> Tensor:
    """(rows + columns, 1) float32. Without a sensitivity, all steps are the tensor's std."""
    if sensitivity is None:
        spread = w.std(correction=0).expand(entry.num_rows, 1)
        return torch.cat([spread, torch.ones_like(w.reshape(entry.num_rows, -1)[:1]).T])
    matrix = sensitivity.reshape(entry.num_rows, -1)
    matrix = matrix + (FLOOR * matrix.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    row = matrix.mean(1, keepdim=True)
    column = (matrix / row).mean(0, keepdim=True)
    at_mean = column.log().mean().exp()  # columns around 1, so that bf16 suits both
    return torch.cat([(12 / math.log(2) / (row * at_mean)).sqrt(), (at_mean / column).sqrt().T])


def steps_at(price: float, entry: Entry, w: Tensor, at_price_one: Tensor) -> Tensor:
    """(rows + columns, 1), wide enough for every weight to have a code."""
    steps = _zoomed(entry, at_price_one, math.sqrt(price))
    _widen_columns(entry, w, steps)
    widen_rows(entry, w, steps)
    return steps


def sampled_counts(price: float, entry: Entry, w: Tensor, at_price_one: Tensor) -> Tensor:
    """(CLASSES, SYMBOLS) counts of a tensor's codes at a price, from some of its rows."""
    assert entry.grid is not None
    num_rows = entry.num_rows
    steps = steps_at(price, entry, w, at_price_one)
    some = torch.cat([steps[:num_rows:SAMPLE], steps[num_rows:]])
    matrix = w.reshape(num_rows, -1)[::SAMPLE]
    codes = round_to_codes(products_in_step_units(matrix, some), entry.grid).to(torch.int8)
    return count_codes(codes, classes_of(codes)) * (num_rows / len(matrix))


def zoom_rows(entry: Entry, w: Tensor, steps: Tensor, zoom: float) -> None:
    """In place: all steps ``zoom`` times as large, and every weight still with a code."""
    steps[: entry.num_rows].mul_(zoom)
    widen_rows(entry, w, steps)


def widen_rows(entry: Entry, w: Tensor, steps: Tensor) -> None:
    """In place, rows whose largest weight has no code."""
    assert entry.grid is not None
    rows = steps[: entry.num_rows]
    by_column = w.detach().reshape(entry.num_rows, -1) / steps[entry.num_rows :].T
    largest = by_column.abs().amax(1, keepdim=True)
    rows.copy_(rows.maximum(largest / (HEADROOM * entry.grid.code_limits[1])))


def _widen_columns(entry: Entry, w: Tensor, steps: Tensor) -> None:
    assert entry.grid is not None
    columns = steps[entry.num_rows :]
    some = slice(0, entry.num_rows, SAMPLE)
    sizes = (w.detach().reshape(entry.num_rows, -1)[some] / steps[some]).abs()
    place = max(math.ceil(COLUMN_SHARE * len(sizes)), 1)
    largest = sizes.kthvalue(place, 0).values[:, None]
    columns.copy_(columns.maximum(largest / (HEADROOM * entry.grid.code_limits[1])))


def _zoomed(entry: Entry, steps: Tensor, zoom: float) -> Tensor:
    return torch.cat([zoom * steps[: entry.num_rows], steps[entry.num_rows :]])
