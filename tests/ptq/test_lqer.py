"""LQER: the best pair of thin factors, by Eckart and Young, and its bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.ptq.lqer import lqer
from qat.quantize.grid import Grid
from qat.quantize.rounding import snap


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trained weights, stored ones, and mean squares of inputs over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    diagonal = 10 ** (4 * torch.rand(columns, generator=generator) - 2)
    return w, snap(w, Grid(bits=3)), diagonal


def weighted_error(weights: Tensor, w: Tensor, diagonal: Tensor) -> float:
    return float(((weights - w).double().square() * diagonal.double()).sum())


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_what_is_left_are_the_small_singular_values(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    w, stored, diagonal = problem(rows, columns, seed)
    rank = min(rank, rows, columns)
    correction = lqer(w, stored, diagonal, rank)
    assert correction.left.shape == (rows, rank)
    assert correction.right.shape == (rank, columns)
    assert correction.left.dtype == correction.right.dtype == torch.float16
    assert correction.num_bytes == 2 * rank * (rows + columns)
    singular = torch.linalg.svdvals((w - stored).double() * diagonal.double().sqrt())
    left = weighted_error(correction.added_to(stored), w, diagonal)
    # fp16 factors: 2^-11 of each product, so about 1e-6 of the squared error
    expected, rounding = float(singular[rank:].square().sum()), float(singular.square().sum())
    assert left == pytest.approx(expected, rel=1e-3, abs=1e-5 * rounding + 1e-14)


def test_no_step_downhill_is_left() -> None:
    """Alternating least squares from our factors finds nothing better; plain SVD is worse."""
    w, stored, diagonal = problem(24, 40, 1)
    ours = lqer(w, stored, diagonal, 5)
    error, weight = (w - stored).double(), diagonal.double()
    least = weighted_error(ours.added_to(stored), w, diagonal)
    right = ours.right.double()
    for _ in range(20):
        left = error * weight @ right.T @ torch.linalg.inv(right * weight @ right.T)
        right = torch.linalg.solve(left.T @ left, left.T @ error)
    refined = float(((error - left @ right).square() * weight).sum())
    assert refined == pytest.approx(least, rel=1e-4)
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    unweighted = float(((error - u[:, :5] * s[:5] @ vt[:5]).square() * weight).sum())
    assert least < 0.9 * unweighted


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_of_the_activations_do_not_matter(unit: float) -> None:
    w, stored, diagonal = problem(12, 16, 2)
    plain, other = (lqer(w, stored, d, 3) for d in (diagonal, diagonal * unit))
    assert torch.allclose(plain.added_to(stored), other.added_to(stored), rtol=0, atol=1e-5)


def test_unused_inputs_are_not_corrected() -> None:
    w, stored, diagonal = problem(12, 16, 3)
    diagonal[4] = 0.0
    assert not lqer(w, stored, diagonal, 3).right[:, 4].any()
    nothing = lqer(w, stored, torch.zeros(16), 3)
    assert torch.equal(nothing.added_to(stored), stored)


def test_without_an_error_nothing_is_added() -> None:
    w, _, diagonal = problem(12, 16, 4)
    assert torch.equal(lqer(w, w, diagonal, 2).added_to(w), w)


def test_bad_input_is_named() -> None:
    w, stored, diagonal = problem(6, 9, 5)
    for rank in (0, -1, 7):
        with pytest.raises(ValueError, match=f"rank = {rank}: give 1 to 6"):
            lqer(w, stored, diagonal, rank)
    with pytest.raises(ValueError, match="NaN"):
        lqer(w, stored, diagonal * math.nan, 2)
