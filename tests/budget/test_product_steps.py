"""Learned steps of rows and columns: what is seen, and gradients against autograd."""

from __future__ import annotations

import math

import torch

from qat.quantize.gradients import see, sum_per_step
from qat.quantize.grid import Grid
from qat.quantize.rounding import encode, snap

GRID = Grid(bits=4, step_rule="learned", step_dtype="fp32", column_steps=True)


def products(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 10, generator=generator)
    steps = torch.rand(16, 1, generator=generator) * 0.3 + 0.2
    steps[6:] += 0.7
    return w, steps


def test_what_is_seen_is_what_is_stored() -> None:
    w, steps = products(0)
    assert torch.equal(see(w, GRID, "identity", steps).weight, snap(w, GRID, steps))


def test_without_steps_columns_have_1() -> None:
    w, _ = products(1)
    found = encode(w, GRID)
    assert torch.equal(found.steps[6:], torch.ones(10, 1))
    assert torch.equal(
        found.steps[:6], encode(w, Grid(bits=4, step_rule="mse", step_dtype="fp32")).steps
    )


def test_gradients_are_those_of_rounding_seen_straight_through() -> None:
    w, steps = products(2)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(w.shape, generator=generator)
    seen = see(w, GRID, "identity", steps)
    assert seen.slope is not None
    assert seen.step_slope is not None
    ours = sum_per_step(upstream * seen.step_slope, GRID, steps)

    leaf_w, leaf = w.clone().requires_grad_(), steps.clone().requires_grad_()
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
