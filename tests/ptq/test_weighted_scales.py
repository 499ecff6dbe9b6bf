"""Scales chosen with the inputs in view: the mse rule where errors in large inputs count more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.quantize.grid import Grid
from qat.quantize.rounding import encode, snap, weighted_scales

GRIDS = [
    Grid(bits=4),
    Grid(bits=3, group_size=13),
    Grid(bits=3, per_tensor=True),
    Grid(bits=4, range="full", scale_dtype="bf16"),
    Grid("ternary", scale_rule="absmean"),
    Grid("fp8_e4m3"),
    Grid(bits=4, scale_rule="fixed", fixed_scale=0.1),
]


@given(st.sampled_from(GRIDS), st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**31))
def test_even_weights_are_the_mse_rule(grid: Grid, rows: int, columns: int, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mse = replace(grid, scale_rule="mse", fixed_scale=None)
    found = encode(w, grid, weighted_scales(w, grid, torch.full((columns,), 3.0)))
    expected = encode(w, mse)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("grid", [Grid(bits=4), Grid(bits=3, group_size=16)])
def test_no_other_share_has_a_smaller_weighted_error(grid: Grid) -> None:
    """Every clip of the rule tried here, one at a time, with plain arithmetic."""
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) ** 3
    importance = torch.logspace(-3, 1, 48)[
        torch.randperm(48, generator=torch.Generator().manual_seed(1))
    ]
    size = grid.group_size or 48

    def error(scales: torch.Tensor) -> torch.Tensor:
        square = (snap(w, replace(grid, scale_rule="given"), scales) - w).square() * importance
        return square.view(32, -1, size).sum(2)

    least = error(weighted_scales(w, grid, importance))
    amax = w.abs().view(32, -1, size).amax(2)
    tried = [error(amax * (1 - 0.04 * k) / (2 ** (grid.bits - 1) - 1)) for k in range(16)]
    assert torch.allclose(least, torch.stack(tried).amin(0))
    evenly = error(encode(w, replace(grid, scale_rule="mse")).scales.float())
    assert (least <= evenly * (1 + 1e-6)).all()
    assert least.sum() < 0.97 * evenly.sum()


def test_grids_without_the_rule_are_refused() -> None:
    w, ones = torch.ones(2, 4), torch.ones(4)
    for grid, message in (
        (Grid("binary", scale_rule="absmean"), "binary levels take absmean"),
        (Grid(bits=4, range="asymmetric"), "range=asymmetric takes"),
        (Grid(bits=4, scale_rule="given", column_scales=True), "column_scales"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_scales(w, grid, ones)
