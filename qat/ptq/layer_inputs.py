"""What every matrix of a model reads, summed up in one pass over some text.

A matrix W computes W x, so the mean square of its output's error is tr(E H E^T) with E the error of
the weights and H the mean of x x^T over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.model.wiring import Watch, wiring_of


@dataclass
class Inputs:
    """Sums over the tokens seen: of x x^T (C, C) and of |x| (C,); and the largest |x| (C,)."""

    products: Tensor
    magnitudes: Tensor
    largest: Tensor


class LayerInputs:
    """``of``: parameter name -> Inputs of each matrix, a tied head's what it reads as head;
    ``row_counts``: name -> (rows,) how often each row of a lookup was taken.

    Queries, keys and values read the same input: its sums are computed once and shared.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], precision: str) -> None:
        self.wiring = wiring_of(spec)
        self.precision, self.weights = precision, dict(weights)
        self.model = empty_model(spec)
        self.of: dict[str, Inputs] = {}
        self.row_counts = {
            name: torch.zeros(len(weights[name]), device=weights[name].device)
            for name in self.wiring.lookups
        }
        self.num_tokens = 0
        self._last: tuple[Tensor, str] | None = None  # kept alive: its memory is not used again

    def _see(self, name: str, x: Tensor, is_lookup: bool) -> None:
        if is_lookup:
            counts = self.row_counts[name]
            counts += torch.bincount(x.flatten(), minlength=len(counts))
            return
        if self._last is not None:
            last, of_name = self._last
            if (last.data_ptr(), last.shape) == (x.data_ptr(), x.shape):
                self.of[name] = self.of[of_name]
                return
        self._last = (x, name)
        flat = x.flatten(0, 1).float()
        with torch.autocast(x.device.type, enabled=False):
            products, sizes = flat.mT @ flat, flat.abs()
        if (seen := self.of.get(name)) is None:
            self.of[name] = Inputs(products, sizes.sum(0), sizes.amax(0))
        else:
            seen.products += products
            seen.magnitudes += sizes.sum(0)
            torch.maximum(seen.largest, sizes.amax(0), out=seen.largest)

    @torch.inference_mode()
    def update(self, ids_BT: Tensor) -> None:
        """See the inputs (B, T) of a batch."""
        bf16 = self.precision == "bf16"
        with (
            torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bf16),
            Watch(self.weights, self._see),
        ):
            torch.func.functional_call(self.model, self.weights, (ids_BT,))
        self._last = None
        self.num_tokens += ids_BT.numel()

    def hessian(self, name: str) -> Tensor:
        """Mean of x x^T (C, C) of what a matrix reads. KeyError for what reads nothing: a lookup
        that is no head, a vector."""
        return self.of[name].products / self.num_tokens
