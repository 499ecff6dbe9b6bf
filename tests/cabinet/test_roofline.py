"""What a forward pass needs, against a counter of torch's; what the machine reaches, by reason."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qat.cabinet import roofline
from qat.cabinet.roofline import measure_ceilings, traffic
from qat.model import attention
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec

SHAPES = [
    ModelSpec(320, 1, 64, 4, 2, 2, True),
    ModelSpec(1024, 5, 96, 6, 3, 2, False),
    ModelSpec(512, 4, 128, 4, 4, 3, True),
    ModelSpec(100, 2, 64, 8, 1, 4, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("seq_len", "batch"), [(16, 1), (128, 3), (256, 1)])
def test_flops_are_those_that_torch_counts(
    shape: ModelSpec, seq_len: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With gradients attention is matrix products, which the counter knows; one block: all pairs.
    monkeypatch.setattr(attention, "QUERY_BLOCK", seq_len)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        GPT(shape)(torch.zeros(batch, seq_len, dtype=torch.long))
    assert traffic(shape, seq_len, batch=batch).flops == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_flops_by_hand(name: str) -> None:
    """C = 48, K = 24, V = 100, 9 tokens, 2 blocks; both have 4 C^2 weights in an MLP of mult 2."""
    matrices = 2 * 48 * 48 + 2 * 48 * 24 + 4 * 48 * 48
    per_token = 2 * (matrices + 2 * 9 * 48) + 48 * 100
    spec = ModelSpec(100, 2, 48, 4, 2, 2, True, name)
    assert traffic(spec, 9).flops == 2 * 9 * per_token


def test_activation_bytes_of_an_architecture_that_says_none() -> None:
    """A block of a Llama: C = 12, K = 6, M = 16, V = 10, three tokens; norms and such are fused."""
    moved = {
        "embedding": (12, 12), "queries": (12, 12), "keys": (12, 6), "values": (12, 6),
        "attention": (12 + 6 + 6, 12), "projection": (12, 12), "gate": (12, 16), "up": (12, 16),
        "down": (16, 12), "head": (12, 10),
    }  # fmt: skip
    spec = ModelSpec(10, 1, 12, 2, 1, 2, True, "llama")
    expected = 4 * 3 * sum(read + written for read, written in moved.values())
    assert traffic(spec, 3).activation_bytes == expected


def test_activation_bytes_of_one_block_by_hand() -> None:
    """C = 8, K = 4, M = 16, V = 10, three tokens: numbers in, numbers out."""
    moved = {
        "embedding": (8, 8), "first norm": (8, 8), "mix": (16, 8), "attention norm": (8, 8),
        "queries": (8, 8), "keys": (8, 4), "values": (8, 4), "norm q": (8, 8), "norm k": (4, 4),
        "rotate q": (8, 8), "rotate k": (4, 4), "gain": (8, 8), "attention": (8 + 4 + 4, 8),
        "projection": (8, 8), "add": (16, 8), "mlp norm": (8, 8), "up": (8, 16),
        "relu^2": (16, 16), "down": (16, 8), "add mlp": (16, 8), "last norm": (8, 8),
        "head": (8, 10), "softcap": (10, 10),
    }  # fmt: skip
    per_token = sum(read + written for read, written in moved.values())
    shape = ModelSpec(10, 1, 8, 4, 2, 2, True)
    assert traffic(shape, 3).activation_bytes == 4 * 3 * per_token
    two, three = (traffic(ModelSpec(10, n, 8, 4, 2, 2, True), 3) for n in (2, 3))
    block = 4 * 3 * (per_token - 8 * 2 - 16 - 16 - 18 - 20)
    skip = 4 * 3 * 3 * 8
    assert two.activation_bytes == traffic(shape, 3).activation_bytes + block + skip
    assert three.activation_bytes == two.activation_bytes + block


def test_batches_and_tokens_multiply() -> None:
    one = traffic(SHAPES[0], 64)
    assert traffic(SHAPES[0], 64, batch=5) == (5 * one.flops, 5 * one.activation_bytes)
    assert traffic(SHAPES[0], 128).activation_bytes == 2 * one.activation_bytes
    assert traffic(SHAPES[0], 128).flops > 2 * one.flops  # attention grows with the square


def test_ceilings_are_measured_within_seconds() -> None:
    started = time.perf_counter()
    found = measure_ceilings(torch.device("cpu"))
    print(f"{time.perf_counter() - started:.2f} s: {found}")
    assert 1e8 < found.bytes_per_second < 1e13
    assert found.flops_per_second.keys() | found.missing.keys() == set(roofline.DTYPES)
    assert found.flops_per_second.keys() >= {"float32", "bfloat16"}
    assert all(1e8 < flops < 1e16 for flops in found.flops_per_second.values())


def test_a_precision_without_a_kernel_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("_int_mm: not on this device\nand a long trace")

    monkeypatch.setattr(torch, "_int_mm", no_kernel)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 64)
    found = measure_ceilings(torch.device("cpu"))
    assert found.missing == {"int8": "_int_mm: not on this device"}
    assert set(found.flops_per_second) == {"float32", "bfloat16"}


def test_rates_are_amounts_over_median_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_median_seconds", lambda work, device: 0.5)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1000)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 10)
    found = measure_ceilings(torch.device("cpu"))
    assert found.bytes_per_second == 4000
    assert found.flops_per_second == dict.fromkeys(roofline.DTYPES, 4000.0)
