"""Every weight in the group that its use gives it, in an order that saved states rely on."""

from __future__ import annotations

import pytest
import torch

from qat.model.registry import model_of
from qat.model.spec import ModelSpec, architectures
from qat.settings.schema import OptimizerSettings
from qat.training.optimizers import build_optimizers


def groups(model: torch.nn.Module, **asked: str) -> list[tuple[float, list[str]]]:
    """(rate, names) of each group of all optimizers."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerSettings(**asked), [])
    return [
        (group["lr"], [names[id(p)] for p in group["params"]])
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_baselines_groups_and_their_order(is_tied: bool) -> None:
    model = model_of(ModelSpec(64, 2, 32, 4, 2, 2, is_tied))
    layers = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    matrices = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]
    vectors = ("attn_scale", "mlp_scale", "resid_mix", "attn.q_gain")
    scalars = ["skip_weights", *(f"blocks.{i}.{name}" for i in range(2) for name in vectors)]
    expected = [
        (0.04, matrices), (0.05 if is_tied else 0.6, ["tok_emb.weight"]), (0.04, scalars),
    ]  # fmt: skip
    if not is_tied:
        expected.append((0.008, ["lm_head.weight"]))
    assert groups(model) == expected
    assert groups(model, name="adamw") == [*expected[1:], expected[0]]


@pytest.mark.parametrize("name", architectures())
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_weight_is_in_one_group(name: str, is_tied: bool) -> None:
    model = model_of(ModelSpec(64, 2, 32, 4, 2, 2, is_tied, name))
    found = [weight for _, weights in groups(model) for weight in weights]
    assert sorted(found) == sorted(dict(model.named_parameters()))
