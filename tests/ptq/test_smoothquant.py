"""SmoothQuant: scales cancel, activations are int8 per token, and outliers cost less."""

from __future__ import annotations

import pytest
import torch

from qat.ptq.smoothquant import migration_scales, snap_tokens
from qat.quantize.grid import Grid
from qat.quantize.rounding import snap


def layer() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens with a few channels 60 times as large, and two matrices that read them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, ::13] *= 60.0
    return x, [torch.randn(rows, 64, generator=generator) * 0.05 for rows in (32, 48)]


def test_tokens_are_int8_with_a_step_each() -> None:
    x = layer()[0].view(4, 64, 64).transpose(0, 1)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(snap_tokens(x), (x / scale).round() * scale)
    assert torch.equal(snap_tokens(x[3, 2]), snap_tokens(x)[3, 2])
    assert not snap_tokens(torch.zeros(3, 5)).any()
    half = x.bfloat16()
    assert torch.equal(snap_tokens(half), snap_tokens(half.float()))


def test_scales_balance_the_largest_of_both_sides() -> None:
    """alpha = 1/2: max|x / s| == max|w * s| in every channel; 0 and 1 level one side."""
    x, weights = layer()
    x_amax, w = x.abs().amax(0), torch.cat(weights)
    s = migration_scales(x_amax, weights)
    assert torch.allclose((x / s).abs().amax(0), (w * s).abs().amax(0))
    all_to_weights = x / migration_scales(x_amax, weights, 1.0)
    assert torch.allclose(all_to_weights.abs().amax(0), torch.ones(64))
    all_to_activations = w * migration_scales(x_amax, weights, 0.0)
    assert torch.allclose(all_to_activations.abs().amax(0), torch.ones(64))


def test_outliers_cost_less() -> None:
    x, weights = layer()
    s, grid = migration_scales(x.abs().amax(0), weights), Grid(bits=8)
    for w in weights:
        exact = x @ w.T
        assert torch.allclose(x / s @ (w * s).T, exact, rtol=0, atol=1e-3)
        plain, smooth = (
            (snap_tokens(x / scale) @ snap(w * scale, grid).T - exact).square().mean()
            for scale in (torch.ones(64), s)
        )
        assert smooth < 0.2 * plain


def test_channels_without_activations_or_weights_keep_their_scale() -> None:
    x_amax, w = torch.tensor([0.0, 2.0, 2.0]), torch.tensor([[1.0, 0.0, 4.0]])
    assert torch.equal(migration_scales(x_amax, [w]), torch.tensor([1.0, 1.0, 0.5**0.5]))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha = .*: give 0 to 1"):
        migration_scales(torch.ones(3), [torch.ones(2, 3)], alpha)
