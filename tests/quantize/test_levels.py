"""Number formats against plain statements of them: a row of ``FORMATS`` each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.artifact.sections import matrix_of
from qat.quantize import levels
from qat.quantize.grid import Grid
from qat.quantize.levels import all_levels
from qat.quantize.plan import Entry
from qat.quantize.rounding import encode, snap
from tests.conftest import code_in, result_of


def of_bytes(dtype: torch.dtype) -> list[float]:
    values = torch.arange(256).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()].unique().tolist()


def mirrored(magnitudes: list[float]) -> list[float]:
    return [-m for m in reversed(magnitudes)] + [0.0, *magnitudes]


# What a grid's levels are, how many bits a magnitude of its codes takes.
FORMATS: dict[str, tuple[Grid, list[float], int]] = {
    "int2": (Grid(bits=2), [-1, 0, 1], 1),
    "int4": (Grid(bits=4), list(range(-7, 8)), 3),
    "int8 full": (Grid(bits=8, range="full"), list(range(-128, 128)), 8),
    "ternary": (Grid("ternary", scale_rule="absmean"), [-1, 0, 1], 1),
    "binary": (Grid("binary", scale_rule="absmean"), [-1, 1], 1),
    "fp8_e4m3": (Grid("fp8_e4m3"), of_bytes(torch.float8_e4m3fn), 7),
    "fp8_e5m2": (Grid("fp8_e5m2"), of_bytes(torch.float8_e5m2), 7),
    "int2_seq": (Grid("int2_seq"), [-1.5, -0.5, 0.5, 1.5], 2),
    "e2m1": (Grid("e2m1"), mirrored([0.5, 1, 1.5, 2, 3, 4, 6]), 3),
    "e2m3": (Grid("e2m3"), mirrored(
        [k / 8 for k in range(1, 16)]
        + [2 + k / 4 for k in range(8)] + [4 + k / 2 for k in range(8)]
    ), 5),
    "e3m2": (Grid("e3m2"), mirrored(
        [k / 16 for k in range(1, 8)]
        + [2**e * (1 + k / 4) for e in range(-1, 5) for k in range(4)]
    ), 5),
    "q4_0": (Grid("q4_0", group_size=32), list(range(-8, 8)), 4),
    "q4_1": (Grid("q4_1", group_size=32), list(range(16)), 4),
    "q5_0": (Grid("q5_0", group_size=32), list(range(-16, 16)), 5),
    "q5_1": (Grid("q5_1", group_size=32), list(range(32)), 5),
    "q8_0": (Grid("q8_0", group_size=32), list(range(-127, 128)), 7),
    "nf4": (Grid("nf4"), [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ], 4),
}  # fmt: skip
formats = pytest.mark.parametrize(
    ("grid", "values", "magnitude_bits"), FORMATS.values(), ids=FORMATS
)


def test_every_format_has_a_row() -> None:
    assert {grid.levels for grid, *_ in FORMATS.values()} == set(all_levels())


@formats
def test_codes_are_bytes_that_give_their_levels_back(
    grid: Grid, values: list[float], magnitude_bits: int
) -> None:
    levels = torch.tensor(values)
    codes = grid.table.to_codes(levels)
    assert codes.dtype == torch.int8
    assert len(codes.unique()) == len(values)
    assert torch.equal(grid.table.from_codes(codes), levels)
    assert grid.table.limits == (values[0], values[-1])
    low, high = grid.table.codes
    assert low <= int(codes.min()) <= int(codes.max()) <= high
    zero = grid.table.to_codes(torch.zeros(1))
    assert int(zero) == 0  # what coders take to be small
    assert math.log2(len(values)) <= grid.table.bits + 1e-9
    assert matrix_of(Entry("w", (2, 3), grid)).bits == magnitude_bits


@formats
@given(numbers=st.lists(st.floats(-600, 600, width=32) | st.floats(-2, 2, width=32), min_size=1))
def test_nearest_is_the_nearest(
    numbers: list[float], grid: Grid, values: list[float], magnitude_bits: int
) -> None:
    """By looking at every level; of a tie either will do."""
    x, levels = torch.tensor(numbers), torch.tensor(values)
    found = grid.table.nearest(x.clone())
    assert torch.isin(found, levels).all()
    least = (x[:, None].double() - levels.double()).abs().amin(1)
    assert torch.allclose((x.double() - found.double()).abs(), least, rtol=1e-6, atol=1e-7)


def by_bitsandbytes(w: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(weights, largest magnitude of each block) by its own quantizer."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(w, blocksize=size, quant_type="nf4")
    return functional.dequantize_4bit(packed, state), state.absmax


@pytest.mark.filterwarnings("ignore")  # of a library's import
def test_nf4_is_that_of_bitsandbytes() -> None:
    w = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    w[5] = 0.0
    grid = Grid("nf4", group_size=64, scale_dtype="fp32")
    theirs, largest = by_bitsandbytes(w, 64)
    assert torch.equal(encode(w, grid).scales.flatten(), largest)
    ours = snap(w, grid)
    same = (ours - theirs).abs() <= 1e-6 * w.abs().max()  # they multiply by 1 / scale: other ties
    assert same.float().mean() > 0.9999
    assert (ours - w).abs().sum() <= (theirs - w).abs().sum() * (1 + 1e-6)


def test_the_format_of_the_docs_is_one_file_and_one_option(train, plug_in) -> None:
    code, option = code_in("add_a_format.md")
    plug_in(levels, all_levels, "pow2", code)
    values = [-1, -0.5, -0.25, -0.125, 0, 0.125, 0.25, 0.5, 1]
    test_codes_are_bytes_that_give_their_levels_back(Grid("pow2"), values, 3)
    fields = [f"grid.{key}={value}" for key, value in yaml.safe_load(option).items()]
    asked = ("qat.enabled=true", "qat.start_step=5", "grid.bits=null", *fields, "run_name=pow2")
    done = train(*asked)
    assert done.code == 0, done.err
    row = result_of(Path("logs/runs/pow2"))
    assert row["grid"] == "pow2_g64"
    assert row["on_grid_share"] == 1.0
    assert row["val_bpb_artifact"] == row["val_bpb_snapped"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 4}, "bits = 4: nf4 has its own levels"),
        ({"range": "full"}, "range = full: nf4 levels are symmetric"),
        ({"scale_rule": "absmean"}, "scale_rule = absmean: nf4 levels take amax, percentile"),
        ({"scale_rule": "learned"}, "scale_rule = learned: nf4 levels take"),
        ({"refit": True}, "refit = True: is for ternary levels"),
    ],
)
def test_nf4_refuses_what_makes_no_sense(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid("nf4", **fields)


def test_a_grid_cannot_be_changed() -> None:
    grid = Grid(bits=4)
    with pytest.raises(AttributeError, match="make another grid"):
        grid.bits = 5
    assert hash(grid) == hash(Grid(bits=4))
    assert grid == Grid(bits=4)
