"""AWQ: the scaled weights are stored exactly, and never worse than the unscaled ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.ptq.awq import ALPHAS, awq
from qat.ptq.gptq import GptqFactor
from qat.quantize.grid import Grid
from qat.quantize.rounding import decode, encode, snap

GRIDS = [
    Grid(bits=4),
    Grid(bits=3, scale_rule="mse", scale_dtype="bf16"),
    Grid(bits=8, scale_rule="percentile", scale_dtype="fp32"),
    Grid(bits=2, scale_rule="sigma", sigma=2.0),
    Grid(bits=4, scale_rule="fixed", fixed_scale=0.02),
]


def inputs(columns: int, seed: int, octaves: float = 4.0) -> Tensor:
    """300 tokens whose channels differ in size by up to 2^octaves, both ways."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.rand(columns, generator=generator) * 2 - 1).mul(octaves).exp2()
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return torch.randn(300, columns, generator=generator) @ mix * size


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(stored: Tensor, w: Tensor, x: Tensor) -> float:
    """Mean square of the outputs' error, by multiplying the activations themselves."""
    return float((x.double() @ (stored - w).double().T).square().mean(0).sum())


def hessian_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double()) / len(x)


@given(st.sampled_from(GRIDS), st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_it_is_stored_exactly_and_never_worse(
    grid: Grid, rows: int, columns: int, seed: int
) -> None:
    w, x = normal(rows, columns, seed), inputs(columns, seed)
    x[:, seed % columns] = 0.0
    found = awq(w, hessian_of(x), x.abs().mean(0), grid)
    stored = decode(found.coded, found.grid)
    assert found.grid.column_scales
    assert torch.equal(snap(w, found.grid, found.coded.scales.float()), stored)
    assert tuple(found.coded.scales.shape) == (rows + columns, 1)
    row_scales, column_scales = found.coded.scales.split((rows, columns))
    assert torch.equal(row_scales, encode(w / column_scales.float().T, grid).scales)
    bound = output_error(snap(w, grid), w, x)
    assert output_error(stored, w, x) <= bound * (1 + 1e-6) + 1e-30


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_it_finds_the_best_power(grid: Grid) -> None:
    """The search again, on scaled weights as the paper writes it: quantize(w * s) / s."""
    w, x = normal(32, 48, 1), inputs(48, 2)
    wide = replace(grid, scale_dtype="fp32")
    found = awq(w, hessian_of(x), x.abs().mean(0), wide)
    size = x.abs().mean(0)
    size = size / size.log().mean().exp()
    errors = []
    for alpha in ALPHAS:
        s = size**alpha
        errors.append(output_error(snap(w * s, wide) / s, w, x))
    assert output_error(decode(found.coded, found.grid), w, x) == pytest.approx(
        min(errors), rel=0.01
    )
    assert abs(found.alpha - ALPHAS[errors.index(min(errors))]) <= 0.05 + 1e-9


def test_large_channels_gain_and_alike_ones_do_not() -> None:
    w, grid = normal(64, 64, 3), Grid(bits=4)
    x = inputs(64, 4)
    gained = awq(w, hessian_of(x), x.abs().mean(0), grid)
    bound = output_error(snap(w, grid), w, x)
    assert output_error(decode(gained.coded, gained.grid), w, x) < 0.8 * bound
    assert gained.alpha > 0.0
    alike = awq(w, torch.eye(64), torch.ones(64), grid)
    assert torch.equal(decode(alike.coded, alike.grid), snap(w, grid))


def test_units_of_the_activations_do_not_matter() -> None:
    w, x = normal(16, 32, 5), inputs(32, 6)
    plain = awq(w, hessian_of(x), x.abs().mean(0), Grid(bits=4))
    large = awq(w, hessian_of(x) * 2.0**40, x.abs().mean(0) * 2.0**20, Grid(bits=4))
    assert plain.alpha == large.alpha
    assert torch.equal(plain.coded.codes, large.coded.codes)


def test_powers_whose_scales_overflow_are_passed_over() -> None:
    w, x = normal(16, 32, 7), inputs(32, 8, octaves=28.0)
    found = awq(w, hessian_of(x), x.abs().mean(0), Grid(bits=4))
    assert torch.isfinite(found.coded.scales).all()
    assert 0.0 < found.alpha < 0.9


def test_gptq_goes_on_from_its_scales() -> None:
    w, x, grid = normal(64, 64, 9), inputs(64, 10), Grid(bits=3, scale_rule="mse")
    found = awq(w, hessian_of(x), x.abs().mean(0), grid)
    both = GptqFactor(hessian_of(x)).quantize(w, found.grid, found.coded.scales.float())
    assert torch.equal(both.scales, found.coded.scales)
    of_awq, of_both = (output_error(decode(c, found.grid), w, x) for c in (found.coded, both))
    assert of_both < 0.9 * of_awq


def test_grids_without_column_scales_are_refused() -> None:
    w, x = normal(2, 4, 0), inputs(4, 0)
    for grid in (
        Grid(bits=4, group_size=2),
        Grid(bits=4, range="asymmetric"),
        Grid("ternary", scale_rule="absmean"),
        Grid(bits=8, code_scale_dtype="fp32"),
    ):
        with pytest.raises(ValueError, match=r"column_scales|asymmetric takes"):
            awq(w, hessian_of(x), x.abs().mean(0), grid)


def test_what_is_not_finite_is_an_error() -> None:
    w, x = normal(2, 4, 0), inputs(4, 0)
    w[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        awq(w, hessian_of(x), x.abs().mean(0), Grid(bits=4))
