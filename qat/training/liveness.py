"""Proof that QAT happened: the weights that the modules really held in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import TrainingError
from qat.qat_model import not_seen, weights_seen
from qat.quantize.plan import Plan
from qat.quantize.rounding import group_views, rotated
from qat.quantize.switch import on_grid_share
from qat.training.loop import Batch, TrainingLoop, UpdateHook

ROUNDING = 1e-6  # of a row's largest gradient: rotated back and forth, a zero is no larger
PROBE_TOKENS = 8  # of the forward pass that checks which weights a model uses


class GradientLiveness(NamedTuple):
    """Which grid-planned masters a backward pass moves."""

    nonzero_share: float  # of elements
    movable_share: float  # of groups of weights: their largest one has a gradient, so can move
    dead: list[str]  # tensors without any gradient


class LivenessProof(UpdateHook):
    """Stops a run whose model does not compute with the weights handed to it; measures, in the
    state of the last QAT update, what one more like it would see."""

    name = "liveness"

    def __init__(self) -> None:
        self.on_grid_share = float("nan")
        self.gradients: GradientLiveness | None = None

    def prime(self, loop: TrainingLoop) -> None:
        probe = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=loop.device)
        check_all_seen(loop.model.model, loop.switch.plan.snap(loop.masters), probe)

    def first_batch(self, loop: TrainingLoop, batch: Batch) -> None:
        weights = loop.model.weights()
        check_graph_uses(loop.loss(weights, *batch), weights)

    def at_qat_end(self, loop: TrainingLoop) -> None:
        loop.refresh()
        weights, switch = loop.model.weights(), loop.switch
        seen = weights_seen(loop.model.model, weights, loop.last_batch[0][:1])
        self.on_grid_share = on_grid_share(seen, loop.masters, switch.plan, switch.learned_scales)
        loss = loop.loss(weights, *loop.last_batch)
        self.gradients = measure_gradients(loss, loop.masters, switch.plan)

    def state(self) -> dict[str, Any]:
        gradients = None if self.gradients is None else self.gradients._asdict()
        return {"on_grid_share": self.on_grid_share, "gradients": gradients}

    def load_state(self, state: Mapping[str, Any], loop: TrainingLoop) -> None:
        self.on_grid_share = state["on_grid_share"]
        if state["gradients"] is not None:
            self.gradients = GradientLiveness(**state["gradients"])


def check_all_seen(model: nn.Module, weights: Mapping[str, Tensor], ids_BT: Tensor) -> None:
    """TrainingError naming a weight that the forward pass does not take from ``weights``."""
    for name, weight in weights.items():
        if not weight.isfinite().all():  # and so is not equal to itself
            raise TrainingError(f"{name} is not finite before the first step")
    for name in not_seen(weights, weights_seen(model, weights, ids_BT)):
        raise TrainingError(
            f"{name}: the forward pass does not use this weight through the copy handed to it, "
            "so quantizing it in training would have no effect"
        )


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
    """What ``loss`` gives the masters of the tensors on a grid; of one that rotates, as rotated,
    since those are the weights that it groups and clamps."""
    gradients = torch.autograd.grad(loss, [masters[entry.name] for entry in plan.on_grid])
    nonzero = elements = movable = groups = 0
    dead = []
    for entry, gradient in zip(plan.on_grid, gradients, strict=True):
        assert entry.grid is not None
        w = rotated(masters[entry.name].detach(), entry.grid)
        if entry.grid.rotate is not None:
            gradient = rotated(gradient, entry.grid)
            largest = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.dim() - 1))
            gradient = gradient.where(gradient.abs() > ROUNDING * largest, 0.0)
        alive = int(gradient.count_nonzero())
        nonzero += alive
        elements += gradient.numel()
        dead += [] if alive else [entry.name]
        views = group_views(w, entry.grid)
        for view, slopes in zip(views, group_views(gradient, entry.grid), strict=True):
            largest = slopes.gather(-1, view.abs().argmax(-1, keepdim=True))
            movable += int(largest.count_nonzero())
            groups += largest.numel()
    return GradientLiveness(nonzero / elements, movable / groups, dead)
