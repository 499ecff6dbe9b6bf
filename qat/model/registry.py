"""Models by their spec. An architecture is a class of this interface, made from a spec alone:

``forward(ids_BT, targets_BT=None)`` gives logits (B, T, V) or the mean loss in nats. Matrices are
those of ``nn.Linear`` or handed to ``F.linear``, lookups those of ``nn.Embedding``; all run on the
meta device too. Its constructor raises ValueError for a spec that it cannot build, and neither
snaps nor stores anything: weights are handed in from outside (``torch.func.functional_call``).

Optional, and found by looking: an argument ``tail`` of forward (logits of the last positions only,
at less than the price of all), methods ``folded`` and ``numbers_moved`` (see qat/model/gpt.py), and
``sizes_of`` (its own sizes, defaults filled in: qat/model/llama.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.spec import ModelSpec, architectures


def architecture_of(spec: ModelSpec) -> Any:
    """The class, which may have more than the interface. ValueError if no file is of that name."""
    if spec.name not in architectures():
        raise ValueError(f"name = {spec.name}: choose from {', '.join(architectures())}")
    return import_module(f"qat.model.{spec.name}").ARCHITECTURE


def model_of(spec: ModelSpec) -> nn.Module:
    """A model with weights as its architecture starts them. ValueError as its constructor's."""
    model: nn.Module = architecture_of(spec)(spec)
    return model


def empty_model(spec: ModelSpec) -> nn.Module:
    """A model that holds no weights: they are handed in."""
    with torch.device("meta"):
        return model_of(spec)


def tensor_shapes(spec: ModelSpec, max_tensors: int | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors; nothing is allocated.

    ValueError as soon as there are more than ``max_tensors``, however many the spec asks for.
    """
    left = [max_tensors]

    def count(_module: nn.Module, _name: str, _parameter: nn.Parameter) -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise ValueError(f"its model has more than {max_tensors} tensors")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        model = empty_model(spec)
    finally:
        hook.remove()
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def last_logits(
    model: nn.Module, weights: Mapping[str, Tensor], ids_BT: Tensor, tail: int | None
) -> Tensor:
    """Logits (B, tail, V) of the last positions, of all if ``tail`` is None."""
    takes_tail = "tail" in inspect.signature(model.forward).parameters
    asked = {"tail": tail} if takes_tail else {}
    logits_BTV: Tensor = torch.func.functional_call(model, dict(weights), (ids_BT,), asked)
    return logits_BTV if takes_tail or tail is None else logits_BTV[:, -tail:]
