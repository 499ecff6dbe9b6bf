"""torchao's rows: they compute with what they hold, and hold what their formats say."""

from __future__ import annotations

from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor

from qat.cabinet import torchao_variants as rows
from qat.cabinet.torchao_variants import torchao_variants
from qat.cabinet.variant import Frozen
from qat.model.spec import ModelSpec
from tests.cabinet.conftest import (
    SHAPE,
    block_matrices,
    frozen_of,
    logits_of,
    named,
    plain_logits,
    random_weights,
)

WEIGHT_ONLY = ("Int8WeightOnly", "IntxWeightOnly int4 g32", "Float8WeightOnly")
DYNAMIC = "Int8DynamicActivationInt8Weight"
FOR_CUDA = {
    "Float8DynamicActivationFloat8Weight": "needs CUDA capability >= 8.9",
    "Int4WeightOnly g32 (mslk)": "needs CUDA capability >= 8.0",
    "Int4WeightOnly g32 (tinygemm)": "needs CUDA capability >= 8.0",
}


def bytes_of_matrix(name: str, rows: int, columns: int) -> int:
    if "int4 g32" in name:  # a byte per code; float32 scale and int8 zero point per group
        return rows * columns + rows * columns // 32 * 5
    return rows * (columns + (4 if "Float8" in name else 5))


def stepped(weight: Tensor) -> Tensor:
    """Codes times scales, by hand from the inner tensors."""
    codes, scales = weight.qdata.float(), weight.scale.float()
    return codes * scales.repeat_interleave(codes.size(1) // scales.size(1), dim=1)


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, DYNAMIC])
def test_rows_compute_with_the_weights_they_hold(name: str, weights: dict[str, Tensor]) -> None:
    before = {key: w.clone() for key, w in weights.items()}
    row = named(torchao_variants(frozen_of(weights)), f"torchao {name}")
    assert row.missing() is None
    kept = row.make()
    dequantized = dict(kept.module.named_parameters())
    for key in block_matrices(weights):
        held = dequantized[key]
        dequantized[key] = held.dequantize()
        torch.testing.assert_close(dequantized[key], stepped(held), rtol=1e-6, atol=1e-7)
    # Activations that are rounded to 8 bits per token move a logit by some hundredths.
    closeness = 0.1 if name == DYNAMIC else 1e-4
    expected = plain_logits(dequantized)
    torch.testing.assert_close(logits_of(kept), expected, rtol=0, atol=closeness)
    if name == DYNAMIC:
        assert (logits_of(kept) - expected).abs().max() > 1e-3  # they are rounded
    assert (expected - plain_logits(weights)).abs().max() > 1e-2  # and so are the weights
    assert kept.embedding == "float32"
    assert torch.equal(dequantized["tok_emb.weight"], weights["tok_emb.weight"])
    assert all(torch.equal(before[key], w) for key, w in weights.items())


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, DYNAMIC])
@pytest.mark.parametrize("is_tied", [True, False])
def test_memory_is_what_the_formats_say(name: str, is_tied: bool) -> None:
    shape = replace(SHAPE, tie_embeddings=is_tied)
    weights = random_weights(shape)
    kept = named(torchao_variants(frozen_of(weights, shape)), f"torchao {name}").make()
    matrices = block_matrices(weights)
    floats = sum(4 * w.numel() for key, w in weights.items() if key not in matrices)
    quantized = sum(bytes_of_matrix(name, *weights[key].shape) for key in matrices)
    assert kept.memory_bytes == floats + quantized
    assert floats * 0.9 < kept.disk_bytes < kept.memory_bytes


def test_four_bits_are_small_on_disk_only(weights: dict[str, Tensor]) -> None:
    variants = torchao_variants(frozen_of(weights))
    int8 = named(variants, "torchao Int8WeightOnly").make()
    int4 = named(variants, "torchao IntxWeightOnly int4 g32").make()
    assert int4.memory_bytes > int8.memory_bytes
    assert int4.disk_bytes < 0.9 * int8.disk_bytes


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_rows_compute_under_autocast(name: str, weights: dict[str, Tensor]) -> None:
    kept = named(torchao_variants(frozen_of(weights)), f"torchao {name}").make()
    exact = logits_of(kept)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits_of(kept), exact, rtol=0, atol=0.3)


def test_every_row_works_or_says_what_it_needs(weights: dict[str, Tensor]) -> None:
    reasons = {v.name: v.missing() for v in torchao_variants(frozen_of(weights))}
    expected = {f"torchao {name}": None for name in [*WEIGHT_ONLY, DYNAMIC]}
    assert reasons == expected | {f"torchao {name}": why for name, why in FOR_CUDA.items()}


def test_needs_are_those_of_the_machine(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine with CUDA would be told, before torchao is asked."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(Frozen, "device", cuda)
    monkeypatch.setattr(rows, "failure", lambda *_: "asked torchao")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    reasons = {v.name: v.missing() for v in torchao_variants(frozen_of(weights))}
    assert reasons["torchao Float8DynamicActivationFloat8Weight"] == "needs CUDA capability >= 8.9"
    assert reasons["torchao Int4WeightOnly g32 (mslk)"] == "needs mslk"
    assert reasons["torchao Int4WeightOnly g32 (tinygemm)"] == "asked torchao"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(rows, "find_spec", lambda name: ModuleSpec(name, None))
    for variant in torchao_variants(frozen_of(weights)):
        assert variant.missing() == "asked torchao"


def test_reasons_are_one_line(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such kernel\nat gpu.cu:12")

    monkeypatch.setattr(rows, "_converted", refuse)
    reasons = [v.missing() for v in torchao_variants(frozen_of(weights))]
    assert reasons[0] == "RuntimeError: no such kernel"


def test_a_shape_that_torchao_refuses_is_a_reason_in_one_line() -> None:
    shape = ModelSpec(96, 2, 48, 4, 2, 2, True)
    variants = torchao_variants(frozen_of(random_weights(shape), shape))
    reason = named(variants, "torchao IntxWeightOnly int4 g32").missing()
    assert reason is not None
    assert "48" in reason


def test_a_matrix_that_torchao_skips_is_an_error(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao import quantization

    monkeypatch.setattr(quantization, "quantize_", lambda *_, **__: None)
    row = named(torchao_variants(frozen_of(weights)), "torchao Int8WeightOnly")
    assert "does not quantize blocks.0.attn.c_q (64, 64)" in (row.missing() or "")
    with pytest.raises(ValueError, match="does not quantize blocks"):
        row.make()


def test_rows_for_cuda_compute_in_bfloat16(weights: dict[str, Tensor]) -> None:
    """Their casts, around a configuration that a CPU has too."""
    row = rows.Row(rows.ROWS["Float8WeightOnly"].config, capability=(0, 0))
    parameters = {key: torch.nn.Parameter(w) for key, w in weights.items()}
    gpt = rows._converted(frozen_of(parameters), row)
    assert parameters["blocks.0.mlp.fc.weight"].dtype == torch.float32  # the caller's own
    layer = gpt.blocks[0].mlp.fc
    assert layer.weight.dtype == torch.bfloat16
    x_BTC = torch.randn(2, 5, 64)
    expected = torch.nn.functional.linear(x_BTC.bfloat16(), layer.weight.dequantize()).float()
    assert torch.equal(layer(x_BTC), expected)
