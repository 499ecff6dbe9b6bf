"""What every matrix of a model reads, summed up in one pass over some text.

A matrix W computes W x, so the mean square of its output's error is tr(E H E^T) with E the error of
the weights and H the mean of x x^T over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.model.gpt import GPT, GPTShape

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"


@dataclass
class Inputs:
    """Sums over the tokens seen: of x x^T (C, C) and of |x| (C,); and the largest |x| (C,)."""

    products: Tensor
    magnitudes: Tensor
    largest: Tensor


class _HiddenStates(nn.Module):
    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gpt = GPT(shape)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.gpt.hidden(ids_BT)


class LayerInputs:
    """``of``: parameter name -> Inputs of each matrix; ``token_counts`` (V,) of the lookups.

    The head's are under ``lm_head.weight``, tied or not. Queries, keys and values read the same
    input: its sums are computed once and shared.
    """

    def __init__(self, shape: GPTShape, weights: Mapping[str, Tensor], precision: str) -> None:
        self.shape, self.precision = shape, precision
        self.model = _HiddenStates(shape)
        self.weights = {f"gpt.{name}": w for name, w in weights.items()}
        self.of: dict[str, Inputs] = {}
        self.token_counts = torch.zeros(shape.vocab_size, device=weights[EMBEDDING].device)
        self.num_tokens = 0
        self._last: tuple[Tensor, str] | None = None  # kept alive: its memory is not used again
        for name, module in self.model.gpt.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: self._see(f"{name}.weight", inputs[0])
                )

    def _see(self, name: str, x: Tensor) -> None:
        if self._last is not None:
            last, of_name = self._last
            if (last.data_ptr(), last.shape) == (x.data_ptr(), x.shape):
                self.of[name] = self.of[of_name]
                return
        self._last = (x, name)
        flat = x.flatten(0, 1).float()
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
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bf16):
            hidden_BTC = torch.func.functional_call(self.model, self.weights, (ids_BT,))
        self._see(HEAD, hidden_BTC)
        self._last = None
        self.token_counts += torch.bincount(ids_BT.flatten(), minlength=self.shape.vocab_size)
        self.num_tokens += ids_BT.numel()

    def read_by(self, name: str) -> Inputs:
        """What a matrix reads; of a tied embedding, what it reads as head.

        KeyError for a tensor that reads nothing: an untied embedding, a vector.
        """
        is_tied = name == EMBEDDING and self.shape.tie_embeddings
        return self.of[HEAD if is_tied else name]

    def hessian(self, name: str) -> Tensor:
        """Mean of x x^T (C, C) of what ``read_by`` gives."""
        return self.read_by(name).products / self.num_tokens
