"""An artifact's header: strict JSON, and sizes that are bounded before anyone allocates by them.

Whoever forges a file also forges its hash, so nothing here trusts one. ValueError, TypeError,
LookupError or RecursionError say what is wrong; the reader makes them one line.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from qat.artifact.coder import CODERS
from qat.quantize.grid import DTYPES
from qat.quantize.plan import Plan

MAX_HEADER_BYTES = (
    1 << 20
)  # some 400 a tensor, so 2,500 tensors; parsed, it takes thirty times that
MAX_DIGITS = 19  # of an integer: nothing true needs more, and products of longer ones take minutes


class Section(NamedTuple):
    name: str
    coder: str
    raw_bytes: int
    coded_bytes: int


@dataclass(frozen=True)
class Header:
    meta: dict[str, Any]
    plan: Plan
    sections: list[Section]

    def as_bytes(self) -> bytes:
        """ValueError if it is longer than a reader takes."""
        content = {"meta": self.meta, "plan": self.plan.as_json(), "sections": self.sections}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        check_length(len(text))
        return text


def check_length(num_bytes: int) -> None:
    if num_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {num_bytes:,} bytes is over {MAX_HEADER_BYTES:,}")


def read_header(text: bytes | bytearray) -> Header:
    """Parse and check; every size in it then fits its plan, and the plan this machine."""
    content = json.loads(
        text.decode(),
        object_pairs_hook=_without_duplicates,
        parse_int=_bounded_int,
        parse_float=_finite,
        parse_constant=_finite,
    )
    plan = Plan.from_json(content["plan"])
    check_memory(plan)
    sections = [Section(*row) for row in content["sections"]]
    expected = section_sizes(plan)
    if [section.name for section in sections] != list(expected):
        raise ValueError("its sections are not " + ", ".join(expected))
    for name, coder, raw_bytes, coded_bytes in sections:
        if type(raw_bytes) is not int or raw_bytes != expected[name]:
            raise ValueError(f"section {name} does not have the size its plan asks for")
        if type(coded_bytes) is not int or coded_bytes < 0:
            raise ValueError(f"section {name} has no usable size")
        if not isinstance(coder, str) or coder not in CODERS:
            raise ValueError(f"section {name} has an unknown coder")
    if not isinstance(content["meta"], dict):
        raise ValueError("its meta is not an object")
    return Header(content["meta"], plan, sections)


def section_sizes(plan: Plan) -> dict[str, int]:
    """Raw bytes of each section, in file order, from the plan alone."""
    floats = [
        (e.grid.step_dtype, math.prod(e.steps_shape)) if e.grid else (e.dtype, e.num_elements)
        for e in plan
    ]
    by_width = {2: 0, 4: 0}
    for dtype, count in floats:
        by_width[DTYPES[dtype].itemsize] += DTYPES[dtype].itemsize * count
    codes = sum(e.num_elements + e.num_zeros for e in plan.on_grid)
    return {"codes": codes, "floats16": by_width[2], "floats32": by_width[4]}


def declared_bytes(plan: Plan) -> int:
    """What its tensors take as float32, steps and zero points included."""
    return 4 * sum(
        e.num_elements + (math.prod(e.steps_shape) + e.num_zeros if e.grid else 0) for e in plan
    )


def check_memory(plan: Plan) -> None:
    """ValueError if reading may take more memory than there is: twice what the plan declares.

    A kilobyte can expand to any size, and honestly: zeros compress that well. No ratio tells such
    a file from a model of zeros, but what does not fit needs no telling.
    """
    needed = 2 * declared_bytes(plan)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"reading its tensors takes up to {needed:,} bytes, this machine has {memory:,}"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has the same key twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"its header has a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"its header has the number {text[:20]}")
    return value
