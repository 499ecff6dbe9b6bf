"""Formats that other programs define, bit for bit against those programs.

MX and NVFP4: torchao; the numbers of minifloats: ml_dtypes; blocks: the gguf package; NF4:
bitsandbytes.
"""

from __future__ import annotations

from unittest import mock

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2

from qat.quantize.grid import Grid
from qat.quantize.levels import all_levels
from qat.quantize.plan import build_plan
from qat.quantize.rounding import decode, encode, nearest_e4m3, snap
from qat.settings.options import read_grid

FLOOR, UP = mx_tensor.ScaleCalculationMode.FLOOR, mx_tensor.ScaleCalculationMode.RCEIL
MX = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6": DTYPE_FP6_E2M3,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@st.composite
def blocks(draw: st.DrawFn, smallest: int = -30) -> Tensor:
    """(8, 96): zero and constant blocks, ties of magnitude, whole numbers, all sizes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = 10.0 ** draw(st.integers(smallest, 3))
    w = torch.randn(8, 96, generator=generator) * size
    w[1] = (w[1] / size * 4).round() * size / 4
    w[2, :32], w[3, 32:64] = 0.0, size
    w[4, 5], w[4, 9] = 3 * size, -3 * size
    w[5, 9], w[5, 40] = -3 * size, 3 * size
    w[6] *= torch.logspace(-6, 2, 96)
    w[7, ::2] = 0.0
    return w


log2 = torch.log2


def log2_in_float64(x: Tensor) -> Tensor:
    """torchao takes it in float32, where it is -57 just above 2^-57 and is not rounded up. Its own
    kernel for GPUs rounds up there: cvt.rp."""
    return log2(x.double())


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
@given(w=blocks())
def test_blocks_are_those_of_the_gguf_package(name: str, w: Tensor) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):  # of the reciprocal of a scale that is nearly 0
        theirs = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind)
    assert same_bits(snap(w, read_grid(name)), torch.from_numpy(theirs))


@pytest.mark.parametrize("rule", ["power", "amax"])
@pytest.mark.parametrize("name", MX)
@given(w=blocks(smallest=-20))  # torchao does not divide by the least scale, 2^-127
def test_mx_is_torchaos(name: str, rule: str, w: Tensor) -> None:
    base = read_grid(name)
    grid = Grid(base.levels, group_size=32, scale_rule=rule, scale_dtype="e8m0")
    mode = FLOOR if rule == "power" else UP
    with mock.patch.object(torch, "log2", log2_in_float64):
        scales, codes = mx_tensor.to_mx(w, MX[name], 32, mode)
    theirs = mx_tensor.to_dtype(codes, scales, MX[name], 32, torch.float32)
    coded = encode(w, grid)
    assert torch.equal(coded.scales.view(torch.uint8).flatten(), scales.view(torch.uint8).flatten())
    assert torch.equal(decode(coded, grid), theirs)  # a level of -0 is 0 here


@pytest.mark.parametrize("exponent", [-100, -57, -20, -1, 0, 30])
def test_a_scale_just_above_a_power_of_two_is_rounded_up(exponent: int) -> None:
    grid = Grid(read_grid("mxfp8").levels, group_size=32, scale_rule="amax", scale_dtype="e8m0")
    amax = torch.tensor(448.0 * 2.0**exponent)  # 448 is the largest level
    at, above = torch.zeros(2, 1, 32)
    at[0, 5], above[0, 5] = amax, amax.nextafter(2 * amax)
    assert encode(at, grid).scales.item() == 2.0**exponent
    assert encode(above, grid).scales.item() == 2.0 ** (exponent + 1)


@given(w=blocks(smallest=-20))
def test_nvfp4_is_torchaos(w: Tensor) -> None:
    whole = nvfp4_tensor.per_tensor_amax_to_scale(w.abs().max())
    theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(w, 16, per_tensor_scale=whole)
    coded = encode(w, read_grid("nvfp4"))
    assert coded.tensor_scale is not None
    assert torch.equal(coded.tensor_scale, whole.reshape(1))
    assert torch.equal(coded.scales.float(), theirs.scale.float())
    assert torch.equal(decode(coded, read_grid("nvfp4")), theirs.dequantize(torch.float32))


def test_e4m3_by_arithmetic_is_the_conversion() -> None:
    """Every normal number, the ties between neighbours, and what is next to these."""
    numbers = torch.arange(8, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties.nextafter(ties * 2), ties.nextafter(ties / 2)])
    assert torch.equal(nearest_e4m3(x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2"])
@given(numbers=st.lists(st.floats(-40, 40, width=32), min_size=1))
def test_minifloats_round_as_ml_dtypes(name: str, numbers: list[float]) -> None:
    table, kind = (
        all_levels()[name],
        getattr(ml_dtypes, f"float{4 if name == 'e2m1' else 6}_{name}fn"),
    )
    every = table.from_codes(torch.arange(table.codes[0], table.codes[1] + 1).char())
    ties = (every[1:] + every[:-1]) / 2
    x = torch.cat([torch.tensor(numbers), every, ties, ties.nextafter(ties + 1)])
    theirs = torch.from_numpy(x.clamp(*table.limits).numpy().astype(kind).astype(np.float32))
    assert torch.equal(table.nearest(x), theirs)


@given(w=blocks(smallest=-6))
def test_nf4_is_that_of_bitsandbytes(w: Tensor) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # a second to import

    w = w[:, :64].contiguous()
    packed, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = dequantize_4bit(packed, state)
    assert torch.equal(snap(w, Grid("nf4", group_size=64, scale_dtype="fp32")), theirs)


def test_the_first_of_two_largest_weights_gives_a_block_its_sign() -> None:
    w = torch.zeros(2, 32)
    w[0, 3], w[0, 7] = 1.0, -1.0
    w[1, 3], w[1, 7] = -1.0, 1.0
    assert encode(w, read_grid("q4_0")).scales.flatten().tolist() == [-0.125, 0.125]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_an_odd_last_block_has_a_scale_of_its_own(name: str) -> None:
    grid = read_grid(name)
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(3, 64)
    padded[:, :40] = w
    assert torch.equal(snap(w, grid), snap(padded, grid)[:, :40])


def test_a_minimum_that_fp16_does_not_hold_names_its_tensor() -> None:
    w = torch.full((2, 32), 1e5)
    plan = build_plan({"w": (2, 32)}, {"grid": read_grid("q4_1")}, {"*": "grid"})
    with pytest.raises(ValueError, match="tensor w, row 0: its scale overflows float16"):
        plan.encode({"w": w})
