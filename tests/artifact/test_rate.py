"""Estimated bits against really coded ones, and their slopes against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.artifact.coder import Matrix, encode_section
from qat.artifact.container import read_artifact
from qat.artifact.rate import bits_of_codes, rate_of


def drawn(rows: int, columns: int, spread: float, seed: int) -> Tensor:
    """Gaussian weights whose rows and columns have scales of their own, in units of a step."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(rows, 1, generator=generator).mul(0.5).exp()
    column = torch.randn(1, columns, generator=generator).mul(0.5).exp()
    return spread * row * column * torch.randn(rows, columns, generator=generator)


def coded_bits(codes: Tensor) -> float:
    matrix = Matrix(*codes.shape, bits=7, role="w", is_sign_magnitude=False)
    return 8 * len(encode_section(codes.numpy().tobytes(), (matrix,), "mix")[1])


@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0, 12.0])
def test_the_estimate_is_near_what_the_coder_charges(spread: float) -> None:
    codes = drawn(512, 512, spread, seed=1).round().clamp(-127, 127).to(torch.int8)
    assert bits_of_codes(codes) == pytest.approx(coded_bits(codes), rel=0.03)


@given(st.integers(0, 10_000), st.floats(0.3, 6.0))
def test_the_estimate_is_an_entropy_with_its_tables(seed: int, spread: float) -> None:
    """Counted another way: by class and symbol, with numpy."""
    codes = drawn(24, 40, spread, seed).round().clamp(-127, 127).to(torch.int8)
    size = np.abs(codes.numpy().astype(np.float64))
    expected = np.outer(size.mean(1), size.mean(0)) / max(size.mean(), 1e-9)
    classes = np.floor(2 * np.log2(np.maximum(expected, 1e-9)) + 24 + 1e-4).clip(0, 39)
    total = 0.0
    for number in np.unique(classes):
        own = codes.numpy()[classes == number]
        counts = np.unique(own, return_counts=True)[1]
        total += -(counts * np.log2(counts / counts.sum())).sum() + 6.0 * len(counts)
    assert bits_of_codes(codes) == pytest.approx(total, rel=0.02)


def test_slopes_are_differences_of_costs() -> None:
    """Moving a weight from one code to the next costs what the tables say, spread over the way."""
    x = drawn(64, 64, 2.0, seed=3)
    codes = x.round().clamp(-127, 127).to(torch.int8)
    rate = rate_of(x, codes)
    assert rate.bits == pytest.approx(bits_of_codes(codes))
    away, towards = rate.slope * x.sign() > 0, rate.slope * x.sign() < 0
    assert away.float().mean() > 0.9  # larger codes are rarer, nearly everywhere
    assert towards.float().mean() < 0.1
    # Shrinking everything by 2 % saves what the slopes promise, nearly.
    promised = float((rate.slope * 0.02 * x).sum())
    smaller = (0.98 * x).round().clamp(-127, 127).to(torch.int8)
    saved = rate.bits - bits_of_codes(smaller)
    assert saved == pytest.approx(promised, rel=0.35)
    # By half a step per octave: at fine steps a doubled step saves one bit a weight.
    fine = drawn(64, 64, 8.0, seed=4)
    slope = rate_of(fine, fine.round().clamp(-127, 127).to(torch.int8)).slope
    assert float((slope * fine).sum()) * math.log(2) / fine.numel() == pytest.approx(1.0, abs=0.2)


def test_trained_weights(finished) -> None:
    artifact = read_artifact(finished / "artifact.qat")
    for item in artifact.encoded:
        if item.coded is None or item.entry.num_elements < 4_000:
            continue
        codes = item.coded.codes.reshape(item.entry.num_rows, -1)
        assert bits_of_codes(codes) == pytest.approx(coded_bits(codes), rel=0.06), item.entry.name


def test_nothing_but_zeros() -> None:
    x = torch.zeros(4, 8)
    rate = rate_of(x, x.to(torch.int8))
    assert math.isfinite(rate.bits)
    assert bool(rate.slope.isfinite().all())
