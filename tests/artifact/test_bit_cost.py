"""Estimated bits against really coded ones, and their slopes against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.artifact.bit_cost import (
    bits_of_codes,
    bits_of_floats,
    classes_of,
    costs_by_class,
    count_codes,
    slopes,
)


def drawn(rows: int, columns: int, spread: float, seed: int) -> Tensor:
    """Gaussian weights whose rows and columns have scales of their own, in units of a scale."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(rows, 1, generator=generator).mul(0.5).exp()
    column = torch.randn(1, columns, generator=generator).mul(0.5).exp()
    return spread * row * column * torch.randn(rows, columns, generator=generator)


def to_codes(x: Tensor) -> Tensor:
    return x.round().clamp(-127, 127).to(torch.int8)


def slopes_of(x: Tensor, codes: Tensor) -> Tensor:
    classes = classes_of(codes)
    return slopes(x, classes, costs_by_class(count_codes(codes, classes)))


def classes_by_numpy(codes: Tensor) -> np.ndarray:
    """By expected magnitude, two classes an octave."""
    size = np.abs(codes.numpy().astype(np.float64))
    expected = np.outer(size.mean(1), size.mean(0)) / max(size.mean(), 1e-9)
    return np.floor(2 * np.log2(np.maximum(expected, 1e-9)) + 24 + 1e-4).clip(0, 39)


@given(st.integers(0, 10_000), st.floats(0.3, 6.0))
def test_the_estimate_is_an_entropy_with_its_tables(seed: int, spread: float) -> None:
    codes = to_codes(drawn(24, 40, spread, seed))
    classes, total = classes_by_numpy(codes), 0.0
    for number in np.unique(classes):
        counts = np.unique(codes.numpy()[classes == number], return_counts=True)[1]
        total += -(counts * np.log2(counts / counts.sum())).sum() + 6.0 * len(counts)
    assert bits_of_codes(codes) == pytest.approx(total, rel=0.02)


def bits_between_codes(x: np.ndarray, codes: Tensor) -> np.ndarray:
    """Each weight's bits as a line between whole codes, in float64, by the tables of ``codes``."""
    classes, bits = classes_by_numpy(codes), np.zeros(x.shape)
    for number in np.unique(classes):
        own = codes.numpy()[classes == number].astype(int)
        counts = np.array([(own == k).sum() + (own == -k).sum() for k in range(-128, 128)]) / 2
        counts[0] = (own == -128).sum() / 2  # 128 is no int8 code
        share = np.maximum(counts, 0.5)
        share /= share.sum()
        here = classes == number
        bits[here] = np.interp(x[here], np.arange(-128, 128), -np.log2(share))
    return bits


@pytest.mark.parametrize("spread", [0.4, 2.0, 9.0])
def test_slopes_are_finite_differences(spread: float) -> None:
    x = drawn(48, 32, spread, seed=3).clamp(-126, 126)
    codes, small = to_codes(x), 1e-4
    found = slopes_of(x, codes)
    wide = x.double().numpy()
    up, down = (bits_between_codes(wide + move, codes) for move in (small, -small))
    differences = (up - down) / (2 * small)
    between = np.abs(wide - np.round(wide)) > small  # at whole codes the line has a corner
    np.testing.assert_allclose(found.numpy()[between], differences[between], atol=1e-3)
    assert between.mean() > 0.99


def test_at_fine_scales_a_doubled_scale_saves_a_bit() -> None:
    fine = drawn(256, 256, 8.0, seed=4).clamp(-127, 127)
    slope = slopes_of(fine, to_codes(fine))
    assert float((slope * fine).sum()) * math.log(2) / fine.numel() == pytest.approx(1.0, abs=0.1)


def test_floats_cost_what_differs_in_them() -> None:
    """Alike: tables alone. At random: all of sign and mantissa, and of exponents what they vary."""
    alike = bits_of_floats([torch.ones(1000), torch.ones(500), torch.ones(500).bfloat16()])
    assert alike < 100
    drawn_bits = bits_of_floats([torch.randn(100_000, generator=torch.Generator().manual_seed(0))])
    assert 24 < drawn_bits / 100_000 < 28


def test_nothing_but_zeros() -> None:
    x = torch.zeros(4, 8)
    assert math.isfinite(bits_of_codes(to_codes(x)))
    assert bool(slopes_of(x, to_codes(x)).isfinite().all())
