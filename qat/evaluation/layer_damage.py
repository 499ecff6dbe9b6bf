"""What quantizing one tensor alone does: to what it computes, and to the score.

A matrix W computes W x, so the mean square of its output's error is tr(E H E^T) with E the error of
the weights and H the mean of x x^T over tokens: one pass over the text finds H for all matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qat.evaluation.ranks import add_over_ranks
from qat.evaluation.score import Scorer
from qat.language.gpt import GPT, GPTShape

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"


@dataclass(frozen=True)
class LayerDamage:
    """Of one tensor, all others left float.

    ``output_error``: root mean square of the error of its output over that of its output. The
    output of a tied embedding is the logits (before the softcap), of an untied one the vectors
    looked up.
    """

    tensor: str
    output_error: float
    val_bpb: float
    delta_bpb: float  # against the float model on the same tokens


class _HiddenStates(nn.Module):
    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gpt = GPT(shape)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.gpt.hidden(ids_BT)


class InputMoments:
    """Sums of x x^T over the inputs x of every matrix of a model; of lookups, counts of tokens.

    Queries, keys and values read the same input: its sum is computed once and shared.
    """

    def __init__(self, shape: GPTShape, weights: Mapping[str, Tensor], precision: str) -> None:
        self.shape, self.precision = shape, precision
        self.model = _HiddenStates(shape)
        self.weights = {f"gpt.{name}": w for name, w in weights.items()}
        self.sums: dict[str, Tensor] = {}  # parameter name -> (C, C) float32; embedding: (V,)
        self._of_input: tuple[Tensor, Tensor] | None = None  # kept: its memory is not used again
        for name, module in self.model.gpt.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: self._see(f"{name}.weight", inputs[0])
                )

    def _see(self, name: str, x: Tensor) -> None:
        seen = self._of_input
        if seen is None or (seen[0].data_ptr(), seen[0].shape) != (x.data_ptr(), x.shape):
            flat = x.flatten(0, 1).float()
            seen = self._of_input = (x, flat.mT @ flat)
        self._add(name, seen[1])

    @torch.inference_mode()
    def update(self, ids_BT: Tensor) -> None:
        """See the inputs (B, T) of a batch."""
        bf16 = self.precision == "bf16"
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=bf16):
            hidden_BTC = torch.func.functional_call(self.model, self.weights, (ids_BT,))
        self._see(HEAD, hidden_BTC)
        self._of_input = None
        counts = torch.bincount(ids_BT.flatten(), minlength=self.shape.vocab_size)
        self._add(EMBEDDING, counts.float())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def output_error(self, name: str, w: Tensor, stored: Tensor) -> float:
        """Relative error of what the tensor computes, as LayerDamage says it."""
        is_lookup = name == EMBEDDING and not self.shape.tie_embeddings
        moments = self.sums[HEAD if name == EMBEDDING and not is_lookup else name].double()

        def power(matrix: Tensor) -> float:
            rows = matrix.double()
            if is_lookup:
                return float((moments[:, None] * rows.square()).sum())
            return float(((rows @ moments) * rows).sum())

        whole = power(w)
        return (power(stored - w) / whole) ** 0.5 if whole else 0.0


def layer_damage(
    scorer: Scorer,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    names: list[str],
    max_targets: int,
) -> list[LayerDamage]:
    """Put each named matrix of ``stored`` among the float ``weights``, alone, and score.

    On about ``max_targets`` tokens, in windows without overlap spread over the text.
    """
    plain = replace(scorer.settings, stride=None, by_document=False)
    limited = replace(scorer, settings=plain, max_targets=max_targets)
    placed = {name: w.to(scorer.device) for name, w in weights.items()}
    moments = InputMoments(scorer.shape, placed, scorer.settings.precision)
    for batch in limited.batches("inputs of layers"):  # none is padded
        moments.update(batch.ids)
    for total in moments.sums.values():
        add_over_ranks(total)
    before = limited.score(placed, "float weights")
    found = []
    for name in names:
        changed = stored[name].to(scorer.device)
        after = limited.score(placed | {name: changed}, name)
        error = moments.output_error(name, placed[name], changed)
        found.append(LayerDamage(name, error, after.val_bpb, after.val_bpb - before.val_bpb))
    return found
