"""Muon (or NorMuon, or AdamW) for the matrices but the head, Adam for everything else.

``base_lr`` is kept in each parameter group; the schedule multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qat.model.wiring import wiring_in
from qat.training.muon import Muon

if TYPE_CHECKING:
    from qat.settings.schema import OptimizerSettings

ADAM_EPS = 1e-8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, learned_scales: list[nn.Parameter]
) -> list[Optimizer]:
    """[Muon, Adam], or [Adam]; every parameter in exactly one group, learned scales in Adam's."""
    wiring, weights = wiring_in(model), dict(model.named_parameters())
    embeddings = [weights[name] for name in wiring.lookups]
    # In the model's order, not that of execution: saved optimizers tell parameters by their place.
    matrices = [weights[name] for name in weights if name in wiring.matrices]
    taken = {*wiring.lookups, *wiring.matrices, wiring.head}
    scalars = [p for name, p in weights.items() if name not in taken]
    groups = [
        {
            "params": embeddings,
            "lr": settings.tied_embedding_lr if wiring.is_tied else settings.embedding_lr,
        },
        {"params": scalars, "lr": settings.scalar_lr},
    ]
    if wiring.head is not None and not wiring.is_tied:
        groups.append({"params": [weights[wiring.head]], "lr": settings.head_lr})
    if learned_scales:
        groups.append({"params": learned_scales, "lr": settings.learned_scale_lr})
    decay = settings.weight_decay
    optimizers: list[Optimizer] = []
    if settings.name == "adamw":
        groups.append({"params": matrices, "lr": settings.matrix_lr, "weight_decay": decay})
    else:
        neuron_beta = settings.neuron_beta if settings.name == "normuon" else None
        dtype = DTYPES[settings.newton_schulz_dtype]
        optimizers.append(
            Muon(matrices, settings.matrix_lr, settings.momentum, decay, dtype, neuron_beta)
        )
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizers.append(
        torch.optim.AdamW(groups, betas=betas, eps=ADAM_EPS, weight_decay=0.0, fused=True)
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = settings.lr_scale * group["lr"]
    return optimizers


def set_rates(optimizers: list[Optimizer], rate: float, momentum: float) -> None:
    """Scale every base rate; Muon is the optimizer that has a momentum."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
            if "momentum" in group:
                group["momentum"] = momentum


def states_by_name(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What they remember of each parameter; tensors are not copied.

    By name, not by place: a run that goes on from another's checkpoint may have scales to learn.
    """
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in parameters.items()
        for optimizer in optimizers
        if parameter in optimizer.state
    }


def load_states(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, Any]],
) -> None:
    """The inverse; parameters without a state start anew. Rates are the optimizers' own."""
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers if states else []:
        members = [names[p] for group in optimizer.param_groups for p in group["params"]]
        kept = {place: states[name] for place, name in enumerate(members) if name in states}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
