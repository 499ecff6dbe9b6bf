"""What the sections of an artifact hold, as its coders see them.

Three sections, in file order: ``codes`` (int8, one symbol per byte, then the zero points of an
asymmetric grid; tensor after tensor in plan order), ``floats16`` and ``floats32``: scales and plain
tensors (low bytes, then high bytes, of all 16-bit values; 32-bit values as is).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import DTYPES


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
    """The codes section as tensors, in its order: codes, then the zero points if there are some.

    The other sections have none.
    """
    found: list[Matrix] = []
    if section != "codes":
        return found
    for entry in plan.on_grid:
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
    floats = [
        (e.grid.scale_dtype, math.prod(e.scales_shape)) if e.grid else (e.dtype, e.num_elements)
        for e in plan
    ]
    by_width = {2: 0, 4: 0}
    for dtype, count in floats:
        by_width[DTYPES[dtype].itemsize] += DTYPES[dtype].itemsize * count
    codes = sum(e.num_elements + e.num_zeros for e in plan.on_grid)
    return {"codes": codes, "floats16": by_width[2], "floats32": by_width[4]}
