"""Proof that QAT happened: the weights that the modules really held in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import TrainingError
from qat.quantize.plan import Plan
from qat.quantize.rounding import group_views
from qat.quantize.switch import QatSwitch, on_grid_share


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


class GradientLiveness(NamedTuple):
    """Which grid-planned masters a backward pass moves."""

    nonzero_share: float  # of elements
    movable_share: float  # of groups of weights: their largest one has a gradient, so can move
    dead: list[str]  # tensors without any gradient


def check_graph_uses(loss: Tensor, weights: Mapping[str, Tensor]) -> None:
    """TrainingError naming a weight that ``loss`` was not computed from.

    A compiled graph that folded the weights, or a flag, of its first call is found by this.
    """
    names = [name for name, weight in weights.items() if weight.numel()]
    gradients = torch.autograd.grad(loss, [weights[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise TrainingError(
                f"{name}: the training step's loss does not come from the weight handed to it, so "
                "quantizing it would have no effect"
            )


def measure_gradients(loss: Tensor, masters: Mapping[str, Tensor], plan: Plan) -> GradientLiveness:
    """What ``loss`` gives the masters of the tensors on a grid."""
    gradients = torch.autograd.grad(loss, [masters[entry.name] for entry in plan.on_grid])
    nonzero = elements = movable = groups = 0
    dead = []
    for entry, gradient in zip(plan.on_grid, gradients, strict=True):
        assert entry.grid is not None
        alive = int(gradient.count_nonzero())
        nonzero += alive
        elements += gradient.numel()
        dead += [] if alive else [entry.name]
        views = group_views(masters[entry.name].detach(), entry.grid)
        for view, slopes in zip(views, group_views(gradient, entry.grid), strict=True):
            largest = slopes.gather(-1, view.abs().argmax(-1, keepdim=True))
            movable += int(largest.count_nonzero())
            groups += largest.numel()
    return GradientLiveness(nonzero / elements, movable / groups, dead)


def measure_on_grid_share(
    model: nn.Module, weights: Mapping[str, Tensor], switch: QatSwitch, ids_BT: Tensor
) -> float:
    """Share of grid-planned elements that a forward pass saw on their grid; 1.0 while QAT is on."""
    seen = weights_seen(model, weights, ids_BT)
    masters = dict(model.named_parameters())
    return on_grid_share(seen, masters, switch.plan, switch.learned_scales)
