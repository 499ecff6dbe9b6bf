"""GPTQ of a whole model: what matrices share is made once, and is gone when the next is made."""

from __future__ import annotations

import weakref

import pytest
import torch

from qat.model.registry import model_of
from qat.model.spec import ModelSpec
from qat.ptq import methods
from qat.ptq.calibration import read_inputs
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan

LAYERS = 3


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_one_factor_is_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(40, LAYERS, 16, 2, 1, 2, name=name)
    weights = {n: torch.randn_like(p) for n, p in model_of(spec).named_parameters()}
    shapes = {n: tuple(w.shape) for n, w in weights.items()}
    plan = build_plan(shapes, {"grid": Grid(bits=4)}, {"*.weight": "grid", "*": "fp32"})
    made: list[weakref.ref] = []
    alive: list[int] = []

    class Counted(methods.GptqFactor):
        def __init__(self, *args, **kwargs) -> None:
            alive.append(sum(factor() is not None for factor in made))
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(methods, "GptqFactor", Counted)
    inputs = read_inputs(spec, weights, torch.arange(80).view(2, 40) % 40)
    methods.encoded_by(plan, weights, methods.gptq(inputs))
    # Queries, keys and values share one, as do a gate and what it gates; and the head's.
    assert len(made) == 4 * LAYERS + 1
    assert set(alive) == {0}
