"""The fast forms of attention and of the loss against torch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qat.model import losses as cross_entropy
from qat.model.attention import causal_attention
from qat.model.layers import rms_norm
from qat.model.losses import softcap_cross_entropy


def _gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_norm_is_torchs(dtype: torch.dtype) -> None:
    """Bit for bit; its gradient as near to that of float64 as torch's is."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 48, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=make, dtype=torch.float64).to(dtype)
    exact = x.detach().double().requires_grad_()
    F.rms_norm(exact, (48,)).backward(upstream.double())
    found = []
    for norm in (rms_norm, lambda x: F.rms_norm(x, (48,))):
        y = norm(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        found.append((y, (gradient.double() - exact.grad).norm()))
    (ours, off), (theirs, their_off) = found
    assert torch.equal(ours, theirs)
    assert off <= 1.1 * their_off + 1e-12 * exact.grad.norm()


@pytest.mark.parametrize("function", [rms_norm, lambda x: causal_attention(x, x, x)])
def test_what_has_no_second_derivative_says_so(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.randn(1, 2, 4, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@given(
    time=st.sampled_from([1, 2, 63, 64, 65, 128, 300]),
    before=st.sampled_from([0, 1, 70]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    dim=st.sampled_from([2, 48]),
    seed=st.integers(0, 99),
)
def test_attention_is_torchs(
    time: int, before: int, groups: int, per_group: int, dim: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)

    def tensor(heads: int, length: int) -> torch.Tensor:
        x = torch.randn(2, heads, length, dim, generator=make, dtype=torch.float64)
        return x.requires_grad_()

    keys = before + time
    q, k, v = tensor(groups * per_group, time), tensor(groups, keys), tensor(groups, keys)
    ours = causal_attention(q, k, v)
    seen = torch.ones(time, keys, dtype=torch.bool).tril(before)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # ours sums in float32
    upstream = torch.randn(ours.shape, generator=make, dtype=torch.float64)
    for own, other in zip(
        _gradients((ours * upstream).sum(), q, k, v),
        _gradients((theirs * upstream).sum(), q, k, v),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 1000])
def test_the_loss_is_torchs(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_TOKENS", 16)  # several chunks, a ragged last
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 24, requires_grad=True)
    head = (4 * torch.randn(50, 24)).requires_grad_()  # reaches the cap
    targets = torch.randint(50, (tokens,))
    ours = softcap_cross_entropy(hidden, head, targets, 30.0)
    theirs = F.cross_entropy(30 * torch.tanh(hidden @ head.mT / 30), targets)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(
        _gradients(ours * 0.25, hidden, head), _gradients(theirs * 0.25, hidden, head), strict=True
    )
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_the_loss_keeps_no_logits() -> None:
    """Between forward and backward only the gradients of hidden state and head are held."""
    hidden, head = torch.randn(4096, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        softcap_cross_entropy(hidden, head, torch.randint(500, (4096,)), 30.0)
    assert kept == [hidden.numel(), head.numel()]
