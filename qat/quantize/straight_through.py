"""The QAT switch: master weights -> the weights the model sees.

The model takes its weights as inputs, so fake quantization never enters its graph: while the switch
is off it sees the masters, while it is on it sees ``plan.snap(masters)``, computed once per
optimizer step outside the model. Both go through the same per-tensor autograd node, so that the
compiled model cannot tell them apart (no recompile at the switch) and gradients reach each master
on its own (DDP overlaps its all-reduce).

Gradient rule: identity, the straight-through estimator of Bengio et al. (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.quantize.plan import Plan


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, master: Tensor, seen: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class QatSwitch:
    """Gives the weights for the next forward pass; call ``refresh`` after every optimizer step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_on = False
        self._snapped: dict[str, Tensor] = {}

    def refresh(self, masters: Mapping[str, Tensor], is_on: bool) -> None:
        """Snap all masters if QAT is on; with QAT off nothing is computed."""
        self.is_on = is_on
        self._snapped = self.plan.snap(masters) if is_on else {}

    def weights(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> weight as the model sees it, with gradients passing straight to the master."""
        return {
            name: _StraightThrough.apply(master, self._snapped.get(name, master.detach()))
            for name, master in masters.items()
        }


@torch.no_grad()
def on_grid_share(seen: Mapping[str, Tensor], masters: Mapping[str, Tensor], plan: Plan) -> float:
    """Share of the elements planned for a grid whose seen value is the one a file would store.

    A tensor that was not seen at all counts as off its grid.
    """
    total = matching = 0
    for entry in plan.on_grid:
        stored = entry.snap(masters[entry.name].detach())
        total += entry.num_elements
        if entry.name in seen:
            matching += int((seen[entry.name] == stored).sum())
    return matching / total
