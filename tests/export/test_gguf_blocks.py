"""Blocks of GGUF from codes and scales, read by the package ``gguf``: the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.export.gguf_blocks import BLOCK, LAYOUTS, gguf_tensor, pack
from qat.export.gguf_file import row_order
from qat.model.llama import rotate_halves
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry
from qat.quantize.rounding import Codes, encode
from tests.export.conftest import OF_GGUF, named

gguf = pytest.importorskip("gguf", reason="needs gguf (export)")
SHAPE = (12, 192)


def weights() -> Tensor:
    """Rows of many sizes, a zero one, and one whose scale is subnormal in float16."""
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    w *= 4 ** torch.linspace(-6, 3, len(w))[:, None]
    w[0], w[1] = 0.0, w[1] * 1e-5
    return w


def stored(grid: Grid, w: Tensor | None = None) -> Encoded:
    w = weights() if w is None else w
    return Encoded(Entry("w", tuple(w.shape), grid), encode(w, grid))


@pytest.mark.parametrize("name", OF_GGUF)
def test_grids_that_gguf_defines(name: str) -> None:
    """The sign of a zero too."""
    item = stored(named(name))
    assert gguf_tensor(item)[0] == name.upper()
    for rows in (torch.arange(len(weights())), torch.randperm(len(weights()))):
        found = read(*gguf_tensor(item, rows))
        assert torch.equal(found.view(torch.int32), item.decode()[rows].view(torch.int32))
    wider = stored(replace(named(name), group_size=96))
    assert torch.equal(read(*gguf_tensor(wider)), wider.decode())


def read(kind: str, data: np.ndarray, shape: tuple[int, ...] = SHAPE) -> Tensor:
    dtype = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(data, dtype).copy()).view(shape)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (Grid(bits=8, group_size=32), "Q8_0"),
        (Grid(bits=4, group_size=32), "Q4_0"),
        (Grid(bits=4, range="full", group_size=32), "Q4_0"),
        (Grid(bits=5, group_size=32), "Q5_0"),
        (Grid(bits=6, group_size=64), "Q8_0"),
        (Grid(bits=3, group_size=128), "Q4_0"),  # the last group is shorter
        (Grid(bits=2), "Q4_0"),
        (Grid(bits=8), "Q8_0"),
        (Grid(bits=8, per_tensor=True), "Q8_0"),
        (Grid(bits=4, range="asymmetric", group_size=32), "Q5_0"),
        (Grid(bits=7, range="asymmetric", group_size=32), "Q8_0"),
        (named("ternary"), "Q4_0"),
        (named("binary"), "Q4_0"),
        (named("int8_golf"), "Q8_0"),
        (named("lsq4"), "Q4_0"),
    ],
    ids=lambda value: value.label if isinstance(value, Grid) else value,
)
def test_whole_numbers_by_float16_scales(grid: Grid, kind: str) -> None:
    grid = replace(grid, scale_dtype="fp16")
    item = stored(grid)
    found, data = gguf_tensor(item)
    assert found == kind
    assert torch.equal(read(kind, data), item.decode())
    rows = torch.randperm(len(item.decode()))
    assert torch.equal(read(*gguf_tensor(item, rows)), item.decode()[rows])


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "MXFP4"])
def test_blocks_are_those_of_the_package(kind: str) -> None:
    """Codes, scales and minima taken out of its own blocks make these blocks again; also with all
    codes and with scales below 0, which the signed-maximum rule makes."""
    layout, dtype = LAYOUTS[kind], gguf.GGMLQuantizationType[kind]
    generator = torch.Generator().manual_seed(2)
    levels = torch.arange(2**layout.bits).repeat(len(weights()) * 192 // 2**layout.bits)
    levels = (levels[torch.randperm(len(levels), generator=generator)] - layout.offset).view(SHAPE)
    scales = torch.randn(12, 6, generator=generator).half()
    minima = torch.randn(12, 6, generator=generator).half() if layout.has_minimum else None
    expected = levels.float().unflatten(1, (-1, BLOCK)) * scales.float()[..., None]
    if minima is not None:
        expected = expected + minima.float()[..., None]
    data = pack(kind, levels.to(torch.int16), scales, minima)
    assert data.nbytes == 12 * 6 * gguf.GGML_QUANT_SIZES[dtype][1]
    assert torch.equal(read(kind, data), expected.flatten(1))

    theirs = gguf.quants.quantize(weights().numpy(), dtype)
    w, size = read(kind, theirs), gguf.GGML_QUANT_SIZES[dtype][1]
    halves = torch.from_numpy(theirs.reshape(-1, size)[:, :4].copy()).view(torch.float16)
    scales = halves[:, 0].view(12, 6)
    minima = halves[:, 1].view(12, 6) if layout.has_minimum else None
    blocks = w.unflatten(1, (-1, BLOCK))
    centred = blocks if minima is None else blocks - minima.float()[..., None]
    codes = torch.where(scales[..., None] == 0, 0.0, centred / scales.float()[..., None]).round()
    assert torch.equal(read(kind, pack(kind, codes.flatten(1).short(), scales, minima)), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_stay_what_they_are(dtype: torch.dtype) -> None:
    plain = torch.randn(SHAPE).to(dtype)
    kind, data = gguf_tensor(Encoded(Entry("w", SHAPE, None), plain=plain))
    assert kind == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]]
    assert torch.equal(read(kind, data), plain.float())
    kind, data = gguf_tensor(Encoded(Entry("norm", (192,), None), plain=plain[0]))
    assert (kind, data.dtype) == ("F32", np.float32)
    assert torch.equal(torch.from_numpy(data), plain[0].float())


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (named("nf4"), "w is on the grid nf4_g64, which GGUF has not; choose grid=q4_0"),
        (named("fp8_e4m3"), "which GGUF has not"),
        (named("rd"), "w has scales of columns too"),
        (Grid(bits=4, group_size=32, rotate=32), "w is stored rotated, .* plan.rotate=null"),
        (Grid(bits=8, scale_dtype="fp32"), "scales of fp32, .* grid.scale_dtype=fp16"),
        (Grid(bits=4, group_size=48), "a scale per 48 columns, .* choose grid.group_size=32"),
        (Grid(bits=8, range="asymmetric"), "levels from -255 to 255 .* grid.range=symmetric"),
    ],
    ids=lambda value: value.label if isinstance(value, Grid) else "",
)
def test_what_gguf_has_not(grid: Grid, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        gguf_tensor(stored(grid))


def test_rows_that_are_no_blocks() -> None:
    with pytest.raises(ValueError, match="tensor w has rows of 48 weights, no multiple of the 32"):
        gguf_tensor(stored(Grid(bits=8), torch.ones(4, 48)))
    coded = Codes(torch.ones(4, 48, dtype=torch.int8), torch.ones(4, 1).half())
    kept = Encoded(Entry("w", (4, 48), None), plain=coded.codes.half())
    assert gguf_tensor(kept)[0] == "F16"


def test_heads_turned_by_neighbours_score_as_those_turned_by_halves() -> None:
    """llama.cpp's rotation of reordered queries and keys, against ours of those stored."""
    spec = ModelSpec(64, 1, 32, 4, 2, 2, True, "llama")
    x = torch.randn(1, 9, 32)
    angle = torch.outer(torch.arange(9.0), 10_000.0 ** -(torch.arange(4) / 4))[:, None]

    def neighbours(heads: Tensor) -> Tensor:
        a, b = heads[..., 0::2], heads[..., 1::2]
        turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(turned, dim=-1).flatten(-2)

    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        w = torch.randn(8 * heads, 32)
        order = row_order(f"model.layers.0.self_attn.{name}.weight", spec)
        ours = rotate_halves((x @ w.T).unflatten(-1, (heads, 8)), 10_000.0)
        theirs = neighbours((x @ w[order].T).unflatten(-1, (heads, 8)))
        scores = [torch.einsum("bthd,bshd->bhts", one, one) for one in (ours, theirs)]
        assert (scores[0] - scores[1]).abs().max() < 1e-3 * scores[0].abs().max()
    assert row_order("model.layers.0.self_attn.v_proj.weight", spec) is None
