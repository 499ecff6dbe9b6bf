"""Bytes of tensors, and of tensors that are made of others."""

from __future__ import annotations

import torch
import zstandard
from torch import Tensor

from qat.cabinet.variant import coded_bytes, inner_bytes


class Pair:
    """Looks like a wrapper subclass: an outer dtype and size that say nothing of what is held."""

    def __init__(self, first: Tensor, second: object) -> None:
        self.first, self.second = first, second

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None


def test_bytes_are_those_of_the_innermost_tensors() -> None:
    codes, scales = torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16)
    zero = torch.tensor(0.5)
    nested = Pair(codes, Pair(scales, zero))
    assert inner_bytes([nested]) == 24 + 8 + 4
    assert inner_bytes([nested, codes, codes.view(24)]) == 24 + 8 + 4  # held once


def test_coded_bytes_are_of_all_inner_bytes_in_order() -> None:
    noise = torch.randint(-128, 128, (64, 33), dtype=torch.int8)
    floats = torch.randn(7, 5)
    raw = noise.t().contiguous().numpy().tobytes() + floats.numpy().tobytes()
    expected = len(zstandard.ZstdCompressor(level=22).compress(raw))
    assert coded_bytes([Pair(noise.t(), floats)]) == expected
    assert coded_bytes([torch.zeros(10_000)]) < 100
    assert coded_bytes([noise]) > noise.numel()  # noise does not compress


def test_a_scalar_and_float8_have_bytes() -> None:
    eight = torch.ones(3).to(torch.float8_e4m3fn)
    assert inner_bytes([torch.tensor(1.0), eight]) == 7
    assert coded_bytes([torch.tensor(1.0), eight]) > 7
