"""The model's own kernels and attention on a GPU."""

from __future__ import annotations

import pytest
import torch

from qat.compiled import forget
from qat.model.attention import causal_attention
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.training.loop import compiled_loss, loss_of
from tests.conftest import compiles
from tests.cuda.test_bits import pytestmark  # noqa: F401

SPEC = ModelSpec(512, 2, 256, 4, 2, 2, True)


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_by_kernels_is_the_plain_one() -> None:
    """Loss and gradients of bfloat16 products; float32 ones say how far they may be apart."""
    torch.manual_seed(0)
    model = GPT(SPEC).cuda()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    assert model.blocks[0].attn.has_kernel
    assert model.blocks[0].mlp.has_kernels
    weights = dict(model.named_parameters())
    ids = torch.randint(512, (4, 513), device="cuda")
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def found(loss, bf16: bool) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            value = loss(weights, x, y)
        return [value.detach(), *torch.autograd.grad(value, list(weights.values()))]

    exact, plain = found(loss_of(model), False), found(loss_of(model), True)
    fused = found(compiled_loss(SPEC), True)
    forget()
    for name, right, a, b in zip(["loss", *weights], exact, plain, fused, strict=True):
        apart = [float((t - right).norm() / right.norm()) for t in (a, b)]
        assert apart[1] < 1.5 * apart[0] + 1e-4, (name, apart)


@pytest.mark.parametrize("queries", [4096, 256])
def test_float32_attention_never_holds_all_scores(queries: int) -> None:
    """Of grouped heads, all positions and the last ones."""
    torch.manual_seed(0)
    q = torch.randn(1, 8, queries, 64, device="cuda")
    k, v = (torch.randn(1, 4, 4096, 64, device="cuda") for _ in range(2))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        y = causal_attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 4 * 8 * queries * 4096
    exact = causal_attention(q.cpu().double(), k.cpu().double(), v.cpu().double())
    torch.testing.assert_close(y.cpu().double(), exact, atol=1e-4, rtol=1e-4)
