"""Learned scales of rows and columns: what is seen, and gradients against autograd."""

from __future__ import annotations

import math

import torch

from qat.quantize.gradients.learned import Learned, sum_per_scale
from qat.quantize.grid import Grid
from qat.quantize.rounding import encode, snap

GRID = Grid(bits=4, scale_rule="learned", scale_dtype="fp32", column_scales=True)


def products(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 10, generator=generator)
    scales = torch.rand(16, 1, generator=generator) * 0.3 + 0.2
    scales[6:] += 0.7
    return w, scales


def test_what_is_seen_is_what_is_stored() -> None:
    w, scales = products(0)
    assert torch.equal(Learned().see(w, GRID, scales=scales).weight, snap(w, GRID, scales))


def test_without_scales_columns_have_1() -> None:
    w, _ = products(1)
    found = encode(w, GRID)
    assert torch.equal(found.scales[6:], torch.ones(10, 1))
    assert torch.equal(
        found.scales[:6], encode(w, Grid(bits=4, scale_rule="mse", scale_dtype="fp32")).scales
    )


def test_gradients_are_those_of_rounding_seen_straight_through() -> None:
    w, scales = products(2)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(w.shape, generator=generator)
    seen = Learned().see(w, GRID, scales=scales)
    assert seen.slope is not None
    assert seen.scale_slope is not None
    ours = sum_per_scale(upstream * seen.scale_slope, GRID, scales)

    leaf_w, leaf = w.clone().requires_grad_(), scales.clone().requires_grad_()
    product = leaf[:6] * leaf[6:].T
    x = leaf_w / product
    clamped = x.clamp(-7, 7)
    rounded = clamped + (clamped.round() - clamped).detach()
    (rounded * product * upstream).sum().backward()
    assert leaf_w.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(upstream * seen.slope, leaf_w.grad)
    scale = torch.cat(
        [torch.full((6, 1), math.sqrt(10 * 7)), torch.full((10, 1), math.sqrt(6 * 7))]
    )
    torch.testing.assert_close(ours, leaf.grad / scale)
