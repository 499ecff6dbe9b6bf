"""Undoing the priming steps: everything that they disturb, as it was before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.quantize.switch import QatSwitch


class Snapshot:
    """Weights, optimizers, gradient rule, scales and random state at the time it is made."""

    def __init__(
        self, masters: Mapping[str, Tensor], optimizers: Sequence[Any], switch: QatSwitch
    ) -> None:
        self._masters, self._optimizers, self._switch = masters, optimizers, switch
        self._weights = {name: p.detach().clone() for name, p in masters.items()}
        self._states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        self._scales = {name: s.detach().clone() for name, s in switch.learned_scales.items()}
        self._of_rule = copy.deepcopy(switch.gradient.state())
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._masters.items():
            parameter.copy_(self._weights[name])
        for optimizer, state in zip(self._optimizers, self._states, strict=True):
            optimizer.load_state_dict(state)
        self._switch.set_scales(self._scales)
        self._switch.gradient.load_state(self._of_rule)
        torch.set_rng_state(self._random)
        if self._cuda_random:
            torch.cuda.set_rng_state_all(self._cuda_random)
