"""Sensitivities predict what small errors really do to the model's distribution."""

from __future__ import annotations

import pytest
import torch

from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.ptq.sensitivity import fisher_diagonal

SHAPE = ModelSpec(vocab_size=40, num_layers=2, dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2,
                 tie_embeddings=True)  # fmt: skip


def test_prediction_is_the_divergence_that_noise_causes() -> None:
    """Half of sum F * d^2 against KL(model || model with noise d), tensor by tensor."""
    torch.manual_seed(0)
    gpt = GPT(SHAPE)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: w.detach() + 0.2 * torch.randn(w.shape, generator=generator)
        for name, w in gpt.named_parameters()
    }
    batches = [(ids := torch.randint(40, (8, 16), generator=generator), ids) for _ in range(80)]
    fisher = fisher_diagonal(gpt, weights, batches, "fp32")
    assert set(fisher) == set(weights)
    logs = [torch.func.functional_call(gpt, weights, (ids,)).log_softmax(-1) for ids, _ in batches]
    for name in ("tok_emb.weight", "blocks.0.attn.c_v.weight", "blocks.1.mlp.proj.weight"):
        found, size = [], 0.01
        for (ids, _), before in zip(batches[:50], logs, strict=False):
            noise = size * torch.randn(weights[name].shape, generator=generator)
            moved = weights | {name: weights[name] + noise}
            after = torch.func.functional_call(gpt, moved, (ids,)).log_softmax(-1)
            found.append(float((before.exp() * (before - after)).sum(-1).mean()))
        measured = sum(found) / len(found)
        predicted = 0.5 * size**2 * float(fisher[name].sum())
        assert 0.8 < predicted / measured < 1.25, (name, predicted, measured)


def test_equal_weights_give_equal_sensitivities() -> None:
    gpt = GPT(SHAPE)
    weights = {name: w.detach() for name, w in gpt.named_parameters()}
    ids = torch.arange(32).view(2, 16)
    first, second = (fisher_diagonal(gpt, weights, [(ids, ids)], "fp32") for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = GPT(SHAPE)
    weights = {name: w.detach() for name, w in gpt.named_parameters()}
    ids, call = torch.arange(32).view(2, 16), torch.func.functional_call

    def watched(model, placed, *args):
        assert {n: w.data_ptr() for n, w in placed.items()} == {
            n: w.data_ptr() for n, w in weights.items()
        }
        return call(model, placed, *args)

    monkeypatch.setattr("torch.func.functional_call", watched)
    assert fisher_diagonal(gpt, weights, [(ids, ids)], "fp32")
    assert not any(w.requires_grad for w in weights.values())
