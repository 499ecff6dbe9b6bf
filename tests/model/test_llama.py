"""The Llama against Hugging Face's own, by its names and numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qat.model.registry import model_of
from qat.model.spec import ModelSpec


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("more", [{}, {"mlp_dim": 40, "rope_base": 5e5, "norm_eps": 1e-4}], ids=str)
def test_it_is_hugging_faces(is_tied: bool, more: dict[str, float]) -> None:
    """Its state dict is ours, name by name, and with it come the same logits and loss."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (dev)")
    spec = ModelSpec(96, 3, 48, 6, 2, 2, is_tied, "llama", more)
    config = transformers.LlamaConfig(
        vocab_size=96, num_hidden_layers=3, hidden_size=48, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=more.get("mlp_dim", 64),
        tie_word_embeddings=is_tied, rms_norm_eps=more.get("norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": more.get("rope_base", 10_000.0)},
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ours = model_of(spec)
    state = {n: w for n, w in theirs.state_dict().items() if not (is_tied and "lm_head" in n)}
    ours.load_state_dict(state)
    ids = torch.randint(0, 96, (2, 33))
    with torch.no_grad():
        expected = theirs(ids).logits
        for found in (ours(ids), torch.enable_grad()(ours)(ids)):  # both kinds of attention
            assert (found - expected).abs().max() < 1e-5
        nats = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert float(ours(ids[:, :-1], ids[:, 1:])) == pytest.approx(float(nats), abs=1e-6)


def test_it_is_causal_and_starts_near_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = model_of(ModelSpec(64, 2, 32, 4, 2, 2, True, "llama"))
    ids = torch.randint(0, 64, (2, 20))
    others = torch.randint(0, 64, (2, 20))
    assert float(model(ids, others).detach()) == pytest.approx(math.log(64), abs=0.1)
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 64
    assert torch.allclose(model(ids)[:, :10], model(changed)[:, :10], atol=1e-5)
    assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:], atol=1e-3)


def test_it_has_the_weights_of_the_baseline() -> None:
    """model=llama_4x288 against the laptop's: matrices alike, gains and norms differ by little."""
    sizes = [
        sum(p.numel() for p in model_of(ModelSpec(1024, 4, 288, 6, 3, 2, True, name)).parameters())
        for name in ("gpt", "llama")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.005)
