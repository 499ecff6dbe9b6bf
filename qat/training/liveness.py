"""Proof that QAT happened: the weights that the modules really held in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.errors import TrainingError
from qat.quantize.plan import Plan
from qat.quantize.straight_through import QatSwitch, on_grid_share


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


def check_all_seen(model: nn.Module, weights: Mapping[str, Tensor], ids_BT: Tensor) -> None:
    """TrainingError naming a weight that the forward pass does not take from ``weights``."""
    seen = weights_seen(model, weights, ids_BT)
    for name, weight in weights.items():
        if name not in seen or not torch.equal(seen[name], weight):
            raise TrainingError(
                f"{name}: the forward pass does not use this weight through the copy handed to it, "
                "so quantizing it in training would have no effect"
            )


def nonzero_gradient_share(loss: Tensor, masters: Mapping[str, Tensor], plan: Plan) -> float:
    """Share of grid-planned elements whose master gets a gradient other than 0 from ``loss``."""
    names = [entry.name for entry in plan.on_grid]
    gradients = torch.autograd.grad(loss, [masters[name] for name in names])
    nonzero = sum(int(g.count_nonzero()) for g in gradients)
    return nonzero / sum(g.numel() for g in gradients)


def measure_on_grid_share(
    model: nn.Module, weights: Mapping[str, Tensor], switch: QatSwitch, ids_BT: Tensor
) -> float:
    """Share of grid-planned elements that a forward pass saw on their grid; 1.0 while QAT is on."""
    seen = weights_seen(model, weights, ids_BT)
    masters = dict(model.named_parameters())
    return on_grid_share(seen, masters, switch.plan, switch.learned_steps)
