"""The single kernels of a block compute what plain torch does, forward and backward."""

from __future__ import annotations

import torch

from tests.conftest import needs_triton, run_with_triton

SPEC = (64, 2, 64, 2, 1, 2, True)  # heads of 32


def whole_model_check() -> None:
    """In float32: loss and every gradient of a model that asks for the kernels, and of one that
    does not."""
    from qat.model import gpt, triton_ops
    from qat.model.spec import ModelSpec

    triton_ops.TILE |= {"BN": 32, "BM": 64, "BK": 32, "num_warps": 4, "num_stages": 1}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = gpt.GPT(ModelSpec(*SPEC)).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(64, (3, 51), device=device)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = model(ids[:, :-1], ids[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = loss_and_gradients()
    gpt.asks_for_kernels = lambda _: True
    for block in model.blocks:
        block.attn.has_kernel = block.mlp.has_kernels = True
    names = ["loss", *(name for name, _ in model.named_parameters())]
    close = 1e-4 if device == "cpu" else 5e-3  # a GPU's products round to tf32
    for name, a, b in zip(names, plain, loss_and_gradients(), strict=True):
        assert float((a - b).norm() / a.norm()) < close, name
        assert name != "blocks.0.attn.q_gain" or float(a.norm()) > 0
    wrong = triton_ops.turned_heads_grad  # the planted fault: the gradient of a gain is lost
    triton_ops.turned_heads_grad = lambda *args: (wrong(*args)[0], torch.zeros_like(args[1]))
    by_name = dict(zip(names, loss_and_gradients(), strict=True))
    assert not by_name["blocks.0.attn.q_gain"].any()


@needs_triton
def test_a_model_by_kernels_is_the_plain_one() -> None:
    run_with_triton(__name__, "whole_model_check")
