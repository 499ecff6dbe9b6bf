"""What every matrix of a model reads, summed up in one pass over some inputs.

A matrix W computes W x, so the mean square of its output's error is tr(E H E^T) with E the error of
the weights and H the mean of x x^T over what it read: tokens, as a rule, or one vector of each text
in a classifier's head. Positions that an ``attention_mask`` leaves out are not counted: they are
padding, which no output depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.model.wiring import Watch, Wiring, arguments, wiring_of


@dataclass
class Inputs:
    """Sums over the ``count`` vectors read: of x x^T (C, C) and of |x| (C,); and the largest |x|
    (C,)."""

    products: Tensor
    magnitudes: Tensor
    largest: Tensor
    count: int


class LayerInputs:
    """``of``: parameter name -> Inputs of each matrix, a tied head's what it reads as head;
    ``row_counts``: name -> (rows,) how often each row of a lookup was taken.

    ``model`` computes with ``weights``, which are handed in. Queries, keys and values read the same
    input: its sums are computed once and shared.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], wiring: Wiring, precision: str
    ) -> None:
        self.wiring = wiring
        self.precision, self.weights = precision, dict(weights)
        self.model = model
        self.of: dict[str, Inputs] = {}
        self.row_counts = {
            name: torch.zeros(len(weights[name]), device=weights[name].device)
            for name in self.wiring.lookups
        }
        self._last: tuple[Tensor, str] | None = None  # kept alive: its memory is not used again
        self._mask: Tensor | None = None  # (B, T) bool: what is no padding

    @staticmethod
    def of_spec(spec: ModelSpec, weights: Mapping[str, Tensor], precision: str) -> LayerInputs:
        """Of a model that is made from its spec."""
        return LayerInputs(empty_model(spec), weights, wiring_of(spec), precision)

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
        is_masked = self._mask is not None and x.shape[:-1] == self._mask.shape
        flat = (x[self._mask] if is_masked else x.reshape(-1, x.size(-1))).float()
        with torch.autocast(x.device.type, enabled=False):
            products, sizes = flat.mT @ flat, flat.abs()
        if (seen := self.of.get(name)) is None:
            self.of[name] = Inputs(products, sizes.sum(0), sizes.amax(0), len(flat))
        else:
            seen.products += products
            seen.magnitudes += sizes.sum(0)
            torch.maximum(seen.largest, sizes.amax(0), out=seen.largest)
            seen.count += len(flat)

    @torch.inference_mode()
    def update(self, inputs: Any) -> None:
        """See a batch: what the model is called with (``qat.model.wiring.arguments``)."""
        args, kwargs = arguments(inputs)
        mask = kwargs.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) else None
        device = next(iter(self.weights.values())).device.type
        with (
            torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"),
            Watch(self.weights, self._see),
        ):
            torch.func.functional_call(self.model, self.weights, args, kwargs)
        self._last = None

    def see_all(self, batches: Iterable[Any]) -> LayerInputs:
        for batch in batches:
            self.update(batch)
        return self

    def hessian(self, name: str) -> Tensor:
        """Mean of x x^T (C, C) of what a matrix reads. KeyError for what reads nothing: a lookup
        that is no head, a vector."""
        return self.of[name].products / self.of[name].count
