"""Proof that QAT happened: the weights that the modules really held in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.quantize.plan import Plan
from qat.quantize.straight_through import on_grid_share


@torch.no_grad()
def weights_seen(
    model: nn.Module, weights: Mapping[str, Tensor], ids_BT: Tensor
) -> dict[str, Tensor]:
    """Run ``model`` with ``weights``; each parameter as its module held it when called."""
    seen: dict[str, Tensor] = {}

    def record(prefix: str):
        def hook(module: nn.Module, _inputs: object) -> None:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                seen[name] = parameter.detach()

        return hook

    handles = [m.register_forward_pre_hook(record(name)) for name, m in model.named_modules()]
    try:
        torch.func.functional_call(model, dict(weights), (ids_BT,))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def measure_on_grid_share(
    model: nn.Module, weights: Mapping[str, Tensor], plan: Plan, ids_BT: Tensor
) -> float:
    """Share of grid-planned elements that a forward pass saw on their grid; 1.0 while QAT is on."""
    seen = weights_seen(model, weights, ids_BT)
    return on_grid_share(seen, dict(model.named_parameters()), plan)
