"""HQQ: decoding, what it minimises, and that it moves zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.ptq.hqq import NORM, hqq
from qat.quantize.grid import Grid
from qat.quantize.rounding import snap


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Heavy tails and a mean of its own in each row."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return w * w.abs() + torch.randn(rows, 1, generator=generator)


@given(st.integers(1, 6), st.integers(1, 70), st.integers(2, 8), st.integers(1, 40), st.integers())
def test_weights_are_what_codes_scales_and_zeros_say(
    rows: int, columns: int, bits: int, group_size: int, seed: int
) -> None:
    w = matrix(rows, columns, seed % 2**31)
    found = hqq(w, bits, group_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert found.codes.dtype == torch.int8
    assert (found.codes >= low).all()
    assert (found.codes <= high).all()
    for row in range(rows):
        for column in range(columns):
            group = column // group_size
            scale, zero = (float(t[row, group]) for t in (found.scales, found.zeros))
            expected = (float(found.codes[row, column]) - zero) * scale
            assert float(found.weights[row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_norm_of_the_error_falls(bits: int) -> None:
    w = matrix(40, 256, 0)
    found = hqq(w, bits, 64)
    rounded = snap(w, Grid(bits=bits, range="asymmetric", group_size=64))
    norms = [(w - q).abs().pow(NORM).sum() for q in (found.weights, rounded)]
    assert norms[0] < 0.97 * norms[1]
    assert (found.zeros.float() % 1 != 0).float().mean() > 0.9


def test_a_constant_group_is_kept() -> None:
    w = torch.full((2, 8), 0.25)
    assert hqq(w, 4, 8).weights.allclose(w, atol=1e-3)
    assert hqq(torch.full((2, 8), -900.0), 4, 8).weights.allclose(torch.tensor(-900.0), rtol=1e-3)
    assert hqq(torch.zeros(2, 8), 4, 8).weights.equal(torch.zeros(2, 8))
