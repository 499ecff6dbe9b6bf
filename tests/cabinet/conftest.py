"""A small model of random weights, and what a variant makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qat.analysis import cost
from qat.cabinet.variant import Frozen, Kept, Variant
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec

SHAPE = ModelSpec(96, 2, 64, 4, 2, 2, True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take most of the time of so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _timed_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which variant is faster takes half a second each to say, and no test here asks."""
    monkeypatch.setattr(cost, "IN_TURN_SECONDS", 0.0)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return random_weights(SHAPE)


def random_weights(shape: ModelSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    named = GPT(shape).named_parameters()
    return {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in named}


def frozen_of(weights: dict[str, Tensor], shape: ModelSpec = SHAPE) -> Frozen:
    """A model that variants are made of which read no text."""
    return Frozen.of_spec(shape, weights, {})


def block_matrices(weights: dict[str, Tensor]) -> list[str]:
    return [n for n in weights if n.startswith("blocks.") and n.endswith(".weight")]


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def logits_of(kept: Kept) -> Tensor:
    """As the scorer computes them."""
    return kept.module(ids(), tail=9)


@torch.inference_mode()
def plain_logits(weights: dict[str, Tensor]) -> Tensor:
    return torch.func.functional_call(GPT(SHAPE), weights, (ids(),), {"tail": 9})


def named(variants: list[Variant], name: str) -> Variant:
    return next(v for v in variants if v.name == name)
