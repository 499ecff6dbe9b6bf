"""What an artifact stores of a tensor -> the blocks of a GGUF file, from its codes and scales.

Nothing is rounded again. A block holds 32 weights of a row and a float16 scale (GGML's Q8_0, Q5_0,
Q4_0), a scale and a minimum (Q5_1, Q4_1), or a power of two for floats of four bits (MXFP4). So a
grid whose weights are whole number * float16 scale fits wherever 32 columns share a scale: also
where more of them do, up to whole rows, since the scale is then written once per block.

Source of the layouts: ggml/src/ggml-quants.c of llama.cpp; the package ``gguf`` reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.levels import Levels
from qat.quantize.plan import Encoded

BLOCK = 32  # weights
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Layout(NamedTuple):
    """How the levels of a block are stored: level + offset as so many bits."""

    bits: int
    offset: int = 0
    has_minimum: bool = False  # added to level * scale
    has_sign: bool = False  # as the highest bit, beside the magnitude

    def holds(self, low: int, high: int) -> bool:
        return low + self.offset >= 0 and high + self.offset < 2**self.bits


WHOLE = {"Q4_0": Layout(4, 8), "Q5_0": Layout(5, 16), "Q8_0": Layout(8, 128)}  # numbers
LAYOUTS = WHOLE | {
    "Q4_1": Layout(4, has_minimum=True),
    "Q5_1": Layout(5, has_minimum=True),
    "MXFP4": Layout(4, has_sign=True),
}
INSTEAD = "choose grid=q4_0, q4_1, q5_0, q5_1, q8_0 or mxfp4"


def gguf_tensor(item: Encoded, rows: Tensor | None = None) -> tuple[str, np.ndarray]:
    """(GGML type, data) of a tensor: float32, float16, or uint8 (rows, bytes of a row).

    ``rows`` is the order that the file wants them in. ValueError: what GGUF cannot hold, and what
    to choose instead.
    """
    name, shape, grid = item.entry.name, item.entry.shape, item.entry.grid
    if grid is None:
        assert item.plain is not None
        plain = item.plain if rows is None else item.plain[rows]
        if plain.dim() < 2:  # llama.cpp multiplies by vectors of float32 only
            plain = plain.float()
        data = plain.view(torch.uint8) if plain.dtype is torch.bfloat16 else plain
        return FLOATS[plain.dtype], data.numpy()
    if shape[-1] % BLOCK:
        raise ValueError(
            f"tensor {name} has rows of {shape[-1]} weights, no multiple of the {BLOCK} of a block;"
            " choose sizes of the model that are, or keep it by a rule of plan.rules, fp16"
        )
    kind = _kind(name, grid)
    assert item.coded is not None
    order = torch.arange(shape[0]) if rows is None else rows
    levels, scales, zeros = item.coded.codes[order], item.coded.scales, item.coded.zeros
    scales = _per_block(scales, grid, shape)[order]
    if zeros is None:
        return kind, pack(kind, levels, scales)
    zeros = _per_block(zeros, grid, shape)[order]
    if LAYOUTS[kind].has_minimum:
        return kind, pack(kind, levels, scales, zeros)
    return kind, pack(kind, levels.short() - zeros.repeat_interleave(BLOCK, dim=1), scales)


def _kind(name: str, grid: Grid) -> str:
    """The type of the smallest blocks that hold a grid's levels and scales. ValueError if none."""
    named = "MXFP4" if grid.levels == "e2m1" else grid.levels.upper()
    is_whole = type(grid.table).from_codes is Levels.from_codes  # its codes are its levels
    if not is_whole and named not in LAYOUTS:
        raise ValueError(
            f"tensor {name} is on the grid {grid.label}, which GGUF has not; {INSTEAD}"
        )
    if grid.rotate is not None:
        raise ValueError(
            f"tensor {name} is stored rotated, and GGUF has no rotation; choose plan.rotate=null"
        )
    if grid.column_scales:
        raise ValueError(f"tensor {name} has scales of columns too, and GGUF has none; {INSTEAD}")
    dtype = "e8m0" if named == "MXFP4" else "fp16"
    if grid.scale_dtype != dtype:
        raise ValueError(
            f"tensor {name} has scales of {grid.scale_dtype}, and GGUF's are {dtype}; choose "
            f"grid.scale_dtype={dtype}, or {INSTEAD.removeprefix('choose ')}"
        )
    if grid.group_size is not None and grid.group_size % BLOCK:
        raise ValueError(
            f"tensor {name} has a scale per {grid.group_size} columns, and GGUF one per {BLOCK}; "
            f"choose grid.group_size={BLOCK}, or a multiple"
        )
    if named in LAYOUTS:
        return named
    low, high = grid.table.codes
    if grid.range == "asymmetric":
        low, high = low - high, high - low
    for kind, layout in WHOLE.items():
        if layout.holds(low, high):
            return kind
    raise ValueError(
        f"tensor {name} has levels from {low} to {high} ({grid.label}), more than a byte holds; "
        f"choose grid.range=symmetric, or {INSTEAD.removeprefix('choose ')}"
    )


def _per_block(found: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """(rows, groups) -> (rows, blocks), of bytes as such."""
    rows, blocks = shape[0], shape[1] // BLOCK
    if found.is_floating_point() and found.element_size() == 1:
        found = found.view(torch.uint8)
    if grid.group_size is not None:
        found = found.repeat_interleave(grid.group_size // BLOCK, dim=1)[:, :blocks]
    return found.expand(rows, blocks)


def pack(kind: str, levels: Tensor, scales: Tensor, minima: Tensor | None = None) -> np.ndarray:
    """Blocks of levels (rows, columns), whole numbers, with scales and minima (rows, blocks), both
    as GGUF stores them; uint8 (rows, bytes of a row)."""
    layout = LAYOUTS[kind]
    heads = torch.stack([scales] if minima is None else [scales, minima], dim=-1)
    columns = [heads.flatten(0, 1).contiguous().view(torch.uint8).numpy()]
    stored = levels.reshape(-1, BLOCK).numpy()
    if layout.bits == 8:
        columns.append(stored.astype(np.int8).view(np.uint8))
    else:
        if layout.has_sign:
            stored = np.abs(stored) | (stored < 0).astype(np.int8) << 3
        codes = (stored + layout.offset).astype(np.uint8)
        if layout.bits == 5:
            columns.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
        first, second = codes[:, : BLOCK // 2] & 15, codes[:, BLOCK // 2 :] & 15
        columns.append(first | second << 4)
    return np.concatenate(columns, axis=1).reshape(len(levels), -1)
