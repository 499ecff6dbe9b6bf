"""What quantizing one tensor alone does: to what it computes, and to the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from qat.evaluation.score import Scorer
from qat.evaluation.windows import read_batches
from qat.ptq.layer_inputs import LayerInputs


@dataclass(frozen=True)
class LayerDamage:
    """Of one tensor, all others left float.

    ``output_error``: root mean square of the error of its output over that of its output. The
    output of a tied embedding is the logits (before a softcap), of an untied one the vectors
    looked up.
    """

    tensor: str
    output_error: float
    val_bpb: float
    delta_bpb: float  # against the float model on the same tokens


def output_error(inputs: LayerInputs, name: str, w: Tensor, stored: Tensor) -> float:
    """Relative error of what the tensor computes, as LayerDamage says it."""

    def power(matrix: Tensor) -> float:
        rows = matrix.double()
        if name not in inputs.of:  # a lookup
            return float((inputs.row_counts[name].double()[:, None] * rows.square()).sum())
        return float(((rows @ inputs.hessian(name).double()) * rows).sum())

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
    inputs = LayerInputs.of_spec(scorer.spec, placed, scorer.settings.precision)
    # Little enough for every rank to see all of it; none of these windows is padded.
    for batch in read_batches(scorer.stream, limited.windows.batches(plain.batch_tokens)):
        inputs.update(batch.ids.to(scorer.device))
    before = limited.score(placed, "float weights")
    found = []
    for name in names:
        changed = stored[name].to(scorer.device)
        after = limited.score(placed | {name: changed}, name)
        error = output_error(inputs, name, placed[name], changed)
        found.append(LayerDamage(name, error, after.val_bpb, after.val_bpb - before.val_bpb))
    return found
