"""What codes will cost before they are coded, and how that changes with the weights and scales.

A code costs what its distribution costs, and the coders know distributions by expected magnitude
(mean of the row * mean of the column), so codes are sorted into classes of it and the estimate is
the entropy within classes, tables included; a file's tensors share them. The estimate is piecewise
constant in the weights; between whole codes it is drawn as a line, whose slope is the gradient
straight through rounding:
d bits / d x = bits(k + 1) - bits(k) for x = w / scale between the codes k and k + 1. The tables are
taken as fixed: by how much a code makes its like cheaper is left out, as it is of second order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CLASSES, CLASSES_PER_OCTAVE = 40, 2
SYMBOLS = 256
BITS_PER_TABLE_CELL = 6.0  # what learning one probability costs a coder, roughly
UNSEEN = 0.5  # counted for codes that do not occur, so that their cost is finite


def classes_of(codes: Tensor) -> Tensor:
    """(rows, columns) codes, any dtype -> int32 classes of expected magnitude."""
    size = codes.abs().float()
    row, column = size.mean(1, keepdim=True), size.mean(0, keepdim=True)
    least = 1e-9
    log_row = (row / size.mean().clamp_min(least)).clamp_min(least).log2()
    expected = log_row + column.clamp_min(least).log2()
    classes = expected.mul_(CLASSES_PER_OCTAVE).add_(CLASSES - 8 * CLASSES_PER_OCTAVE)
    return classes.clamp_(0, CLASSES - 1).int()


def entropy_bits(counts: Tensor) -> float:
    """Bits for all symbols of a table of counts (classes, symbols), its own size included."""
    counts = counts.double()
    nats = torch.special.entr(counts).sum() - torch.special.entr(counts.sum(1)).sum()
    return float(nats) / math.log(2) + BITS_PER_TABLE_CELL * int(counts.count_nonzero())


def count_codes(codes: Tensor, classes: Tensor) -> Tensor:
    """(CLASSES, SYMBOLS) counts of int8 codes; symbol 128 is the code 0."""
    cells = (classes * SYMBOLS).add_(codes.int() + SYMBOLS // 2).flatten()
    return torch.bincount(cells, minlength=SYMBOLS * CLASSES).view(CLASSES, SYMBOLS)


def bits_of_codes(codes: Tensor) -> float:
    """Estimated bits of int8 codes (rows, columns)."""
    return entropy_bits(count_codes(codes, classes_of(codes)))


def bits_of_floats(tensors: Sequence[Tensor]) -> float:
    """Estimated bits of floats as stored; bytes of one place in them share a table."""
    bits = 0.0
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        of_dtype = [tensor.flatten() for tensor in tensors if tensor.dtype == dtype]
        octets = torch.cat(of_dtype).view(torch.uint8).reshape(-1, dtype.itemsize)
        planes = [torch.bincount(plane, minlength=SYMBOLS) for plane in octets.T]
        bits += entropy_bits(torch.stack(planes))
    return bits


def costs_by_class(counts: Tensor) -> Tensor:
    """Counts (CLASSES, SYMBOLS) -> bits of each symbol, finite for those that do not occur.

    Distributions are symmetric: both signs count for a magnitude, which steadies rare codes.
    """
    both = (counts + counts.flip(1).roll(1, 1)).float().div_(2).clamp_min_(UNSEEN)
    return -(both / both.sum(1, keepdim=True)).log2()


def slopes(x: Tensor, classes: Tensor, costs: Tensor) -> Tensor:
    """d bits / d x of weights ``x`` (rows, columns) in units of their scales, float32; NaN is 0.

    ``costs`` (CLASSES, SYMBOLS): bits of each code in each class.
    """
    rises = costs[:, 1:] - costs[:, :-1]  # from code k - 128 to the next
    below = x.floor().nan_to_num_(0.0).clamp_(-SYMBOLS // 2, SYMBOLS // 2 - 2).int()
    cells = (classes * (SYMBOLS - 1)).add_(below + SYMBOLS // 2)
    return rises.flatten()[cells.long()]
