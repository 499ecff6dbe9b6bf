"""The baseline architecture: names, order of initialisation, and what it computes."""

from __future__ import annotations

import hashlib

import pytest
import torch

from qat.model.gpt import GPT, rotate
from qat.model.spec import ModelSpec

GOLF_SHAPE = ModelSpec(512, 3, 320, 5, 1, 3, False)
# Of the baseline trainer's own initial weights for this shape and seed 1337.
GOLF_INITIAL_SHA256 = "6c7948a99a35d37d17d1b3f3b07505d607066deb7bed7d700d9f5e70206941ee"


def test_initial_weights_are_the_baselines() -> None:
    torch.manual_seed(1337)
    digest = hashlib.sha256()
    for name, w in sorted(GPT(GOLF_SHAPE).state_dict().items()):
        digest.update(name.encode())
        digest.update(w.contiguous().numpy().tobytes())
    assert digest.hexdigest() == GOLF_INITIAL_SHA256


def test_parameter_names_are_the_fields() -> None:
    names = set(GPT(ModelSpec(64, 2, 32, 4, 2, 2, True)).state_dict())
    block = ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight",
             "attn.q_gain", "mlp.fc.weight", "mlp.proj.weight", "attn_scale", "mlp_scale",
             "resid_mix")  # fmt: skip
    expected = {"tok_emb.weight", "skip_weights"}
    assert names == expected | {f"blocks.{i}.{name}" for i in range(2) for name in block}


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_causal_and_starts_as_a_uniform_guess(num_layers: int) -> None:
    torch.manual_seed(0)
    model = GPT(ModelSpec(64, num_layers, 32, 4, 2, 2, False))
    ids = torch.randint(0, 64, (2, 20))
    assert model(ids, ids).item() == pytest.approx(float(torch.tensor(64.0).log()), abs=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 64
    assert torch.allclose(model(ids)[:, :10], model(changed)[:, :10], atol=1e-5)
    assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:], atol=1e-3)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    q = torch.randn(1, 1, 1, 16).expand(1, 1, 12, 16)
    k = torch.randn(1, 1, 1, 16).expand(1, 1, 12, 16)
    assert torch.allclose(rotate(q).norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    scores = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
