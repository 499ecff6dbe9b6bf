"""bitsandbytes' rows: against its own dequantization, the papers' formulas, and their bytes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from qat.cabinet import bitsandbytes_variants as rows
from qat.cabinet.bitsandbytes_variants import bitsandbytes_variants
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from tests.cabinet.conftest import (
    block_matrices,
    frozen_of,
    logits_of,
    named,
    plain_logits,
    random_weights,
)

FOUR_BIT = ("NF4", "NF4 double", "FP4")


def dequantized(kept: rows.Kept, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    found = dict(kept.module.named_parameters())
    for key in block_matrices(weights):
        layer = kept.module.get_submodule(key.removesuffix(".weight"))
        if layer.weight.dtype == torch.int8:
            found[key] = layer.state.CB.float() * layer.state.SCB[:, None] / 127
        else:
            found[key] = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def nf4_levels() -> Tensor:
    """The quantiles of the normal distribution that QLoRA takes: 8 above zero, 7 below, zero."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate((above, [0.0], below)))
    return torch.from_numpy(levels / levels.max()).float()


def nearest(weight: Tensor, levels: Tensor) -> Tensor:
    """Each weight at the level nearest to it, of the largest magnitude of its block of 64."""
    blocks = weight.reshape(-1, 64)
    amax = blocks.abs().amax(dim=1, keepdim=True)
    index = ((blocks / amax)[..., None] - levels).abs().argmin(dim=-1)
    return (levels[index] * amax).reshape(weight.shape)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bits_compute_with_the_weights_they_hold(
    name: str, weights: dict[str, Tensor]
) -> None:
    before = {key: w.clone() for key, w in weights.items()}
    kept = named(bitsandbytes_variants(frozen_of(weights)), f"bitsandbytes {name}").make()
    held = dequantized(kept, weights)
    expected = plain_logits(held)
    torch.testing.assert_close(logits_of(kept), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_of(kept), expected, rtol=0, atol=1e-4)  # again: no repacking
    assert (expected - plain_logits(weights)).abs().max() > 1e-2
    assert kept.embedding == "float32"
    assert torch.equal(held["tok_emb.weight"], weights["tok_emb.weight"])
    assert all(torch.equal(before[key], w) for key, w in weights.items())


@pytest.mark.parametrize("name", FOUR_BIT)
def test_rows_of_any_length_are_near_the_trained_weights(name: str) -> None:
    """Version 0.50 decodes wrongly, on a CPU, where a block of 64 goes on in the next row."""
    shape = ModelSpec(48, 2, 96, 4, 2, 2, True)
    torch.manual_seed(0)
    weights = {n: torch.randn_like(p) * 0.1 for n, p in GPT(shape).named_parameters()}
    kept = named(bitsandbytes_variants(frozen_of(weights, shape)), f"bitsandbytes {name}").make()
    for key, found in dequantized(kept, weights).items():
        if key in block_matrices(weights):
            assert (found - weights[key]).norm() < 0.15 * weights[key].norm(), key
    odd = ModelSpec(48, 2, 24, 4, 2, 2, True)
    variant = named(
        bitsandbytes_variants(frozen_of(random_weights(odd), odd)), f"bitsandbytes {name}"
    )
    assert variant.missing() == "needs rows of a multiple of 32 weights"


@pytest.mark.parametrize("name", FOUR_BIT)
def test_levels_are_those_of_the_papers(name: str, weights: dict[str, Tensor]) -> None:
    kept = named(bitsandbytes_variants(frozen_of(weights)), f"bitsandbytes {name}").make()
    key = "blocks.1.mlp.fc.weight"
    found = dequantized(kept, weights)[key]
    if name == "FP4":
        magnitudes = torch.tensor([0.0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
        levels = torch.cat((-magnitudes, magnitudes))
    else:
        levels = nf4_levels()
    # Double quantization rounds the magnitude of a block to 8 bits.
    atol = 2e-3 if name == "NF4 double" else 2e-6
    share = torch.isclose(found, nearest(weights[key], levels), rtol=0, atol=atol).float().mean()
    assert share > 0.999  # the library's thresholds between levels have few digits


def test_llm_int8_is_the_papers_sum(weights: dict[str, Tensor]) -> None:
    """int8 times int8 but for columns that hold an outlier, which stay floats."""
    kept = named(bitsandbytes_variants(frozen_of(weights)), "bitsandbytes LLM.int8").make()
    weight = weights["blocks.0.attn.c_k.weight"].half()
    amax = weight.abs().amax(dim=1).float()
    codes = (weight * (127 / amax[:, None])).round()
    x_NC = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    x_NC[2, 5], x_NC[4, 60] = 40.0, -7.0
    plain = torch.ones(64, dtype=torch.bool)
    plain[[5, 60]] = False
    small = x_NC.half()[:, plain]
    scales = small.abs().amax(dim=1).float() / 127
    rounded = (small / scales[:, None]).round() * scales[:, None]
    dequantized_KC = codes * amax[:, None] / 127
    expected = F.linear(rounded, dequantized_KC[:, plain])
    expected += F.linear(x_NC[:, ~plain], dequantized_KC[:, ~plain])
    found = kept.module.get_submodule("blocks.0.attn.c_k")(x_NC)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)  # a code more or less, of fp16
    everything = x_NC.abs().amax(dim=1).float() / 127  # without the outliers apart: far off
    coarse = (x_NC / everything[:, None]).round() * everything[:, None]
    assert (F.linear(coarse, dequantized_KC) - expected).abs().max() > 0.1


def test_llm_int8_is_close_to_its_weights(
    weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    kept = named(bitsandbytes_variants(frozen_of(weights)), "bitsandbytes LLM.int8").make()
    # Activations are rounded to 8 bits per token.
    expected = plain_logits(dequantized(kept, weights))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits_of(kept), expected, rtol=0, atol=0.1)
    assert not caplog.records
    assert (logits_of(kept) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*FOUR_BIT, "LLM.int8"])
def test_memory_is_what_the_formats_say(name: str, weights: dict[str, Tensor]) -> None:
    kept = named(bitsandbytes_variants(frozen_of(weights)), f"bitsandbytes {name}").make()
    matrices = block_matrices(weights)
    expected = sum(4 * w.numel() for key, w in weights.items() if key not in matrices)
    for key in matrices:
        num_rows, numel = weights[key].size(0), weights[key].numel()
        expected += {
            "LLM.int8": numel + 4 * num_rows,
            "NF4": numel // 2 + 4 * numel // 64 + 16 * 4,
            "FP4": numel // 2 + 4 * numel // 64 + 16 * 4,
            # a byte per block, a float per 256 blocks, their mean, and 256 levels
            "NF4 double": numel // 2 + numel // 64 + 4 * -(-numel // 64 // 256) + 4 + 17 * 64,
        }[name]
    assert kept.memory_bytes == expected
    assert kept.disk_bytes < kept.memory_bytes


@pytest.mark.parametrize("name", [*FOUR_BIT, "LLM.int8"])
def test_rows_compute_under_autocast(name: str, weights: dict[str, Tensor]) -> None:
    kept = named(bitsandbytes_variants(frozen_of(weights)), f"bitsandbytes {name}").make()
    exact = logits_of(kept)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits_of(kept), exact, rtol=0, atol=0.3)


def test_without_the_package_rows_say_how_to_get_it(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = bitsandbytes_variants(frozen_of(weights))
    assert [v.missing() for v in variants] == [None] * 4
    monkeypatch.setattr(rows, "find_spec", lambda _: None)
    for variant in variants:
        assert variant.missing() == "needs bitsandbytes: pip install -e '.[cabinet]'"
