"""What the sections of an artifact hold, as its coders see them.

Sections in file order: ``codes`` (int8, one symbol per byte, then the zero points of an asymmetric
grid; tensor after tensor in plan order), ``floats8`` (scales of a byte, in files that have some),
``floats16`` and ``floats32``: scales, minima and plain tensors (low bytes, then high bytes, of all
16-bit values; 32-bit values as is).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qat.quantize.plan import Entry, Plan


class Matrix(NamedTuple):
    """What a coder may know of a tensor of codes before it has seen one."""

    rows: int
    columns: int
    bits: int  # of the largest magnitude
    is_sign_magnitude: bool  # the top bit is the sign, of zeros too
    role: str  # its name without layer numbers


Matrices = Sequence[Matrix]

Coded = bytes | bytearray | memoryview


def matrix_of(entry: Entry) -> Matrix:
    """The codes of a tensor on a grid, as a coder sees them."""
    assert entry.grid is not None
    has_sign = entry.grid.table.zero_has_sign
    low, high = entry.grid.table.codes
    largest = high if has_sign else max(-low, high)
    role = re.sub(r"\d+", "*", entry.name)
    columns = entry.num_elements // max(entry.num_rows, 1)
    return Matrix(entry.num_rows, columns, largest.bit_length(), has_sign, role)


def matrices_of(plan: Plan, section: str) -> list[Matrix]:
    """A section of bytes as tensors, in its order; of codes with the zero points if there are some.

    The sections of wider values have none.
    """
    found: list[Matrix] = []
    if section not in ("codes", "floats8"):
        return found
    for entry in plan.on_grid:
        if section == "floats8":
            if entry.stored_floats[0][0].itemsize == 1:
                role = f"scales of {matrix_of(entry).role}"
                found.append(Matrix(*entry.scales_shape, 8, False, role))
            continue
        found.append(matrix_of(entry))
        if entry.num_zeros:
            found.append(Matrix(1, entry.num_zeros, 8, False, "zero points"))
    return found


class Section(NamedTuple):
    name: str
    coder: str
    raw_bytes: int
    coded_bytes: int


def section_sizes(plan: Plan) -> dict[str, int]:
    """Raw bytes of each section, in file order, from the plan alone."""
    by_width = {1: 0, 2: 0, 4: 0}
    for entry in plan:
        for dtype, shape in entry.stored_floats:
            by_width[dtype.itemsize] += dtype.itemsize * math.prod(shape)
    codes = sum(e.num_elements + e.num_zeros for e in plan.on_grid)
    bytes_ = {"floats8": by_width[1]} if by_width[1] else {}
    return {"codes": codes, **bytes_, "floats16": by_width[2], "floats32": by_width[4]}


def section_of(dtype: torch.dtype) -> str:
    return f"floats{8 * dtype.itemsize}"
