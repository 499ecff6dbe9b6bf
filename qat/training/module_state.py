"""What a checkpoint holds of a training run: everything that a later process needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from qat.training.clock import TrainingClock
from qat.training.liveness import GradientLiveness
from qat.training.progress import Progress

if TYPE_CHECKING:
    from qat.training.module import QatModule


def state_of(module: QatModule) -> dict[str, Any]:
    """Plain values and tensors, which are not copied."""
    control = module.price_control
    return {
        "weights": {name: p.detach() for name, p in module.masters.items()},
        "optimizers": [optimizer.state_dict() for optimizer in module.trainer.optimizers],
        "learned_scales": {n: s.detach() for n, s in module.switch.learned_scales.items()},
        "gradient_rule": module.switch.gradient.state(),
        "averaging": module.averaging.state(),
        "price_control": None if control is None else control.state(),
        "progress": asdict(module.progress),
        "switched_at": module.switched_at,
        "on_grid_share": module.on_grid_share,
        "gradients": None if module.gradients is None else module.gradients._asdict(),
    }


@torch.no_grad()
def resume(module: QatModule, state: dict[str, Any]) -> None:
    """Go on from ``state`` at the next ``fit``; optimizers take theirs up when it starts."""
    for name, parameter in module.masters.items():
        parameter.copy_(state["weights"][name])
    module.resumed_optimizers = state["optimizers"]
    module.switch.set_scales(state["learned_scales"])
    module.switch.gradient.load_state(state["gradient_rule"])
    module.averaging.resume(state["averaging"])
    module.progress = Progress(**state["progress"])
    module.clock = TrainingClock(module.progress.elapsed_seconds)
    module.checkpointing.last_seconds = module.progress.elapsed_seconds
    module.switched_at = state["switched_at"]
    module.on_grid_share = state["on_grid_share"]
    if state["gradients"] is not None:
        module.gradients = GradientLiveness(**state["gradients"])
    if module.price_control is not None:
        module.price_control.resume(state["price_control"], next(module.gpt.parameters()).device)
        if module.switched_at is not None:
            module.schedule = module.schedule.shortened(module.price_control.kept_seconds)
