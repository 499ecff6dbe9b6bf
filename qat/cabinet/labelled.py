"""A labelled task as what variants are judged by: macro F1 first, then all of ``analysis.labels``.

A model may have several heads (a mapping of logits): the first of ``heads`` gives the row's own
keys, the others theirs with the head's name before. A model whose logits have one dimension more,
in front, is an ensemble: what it says is the mean of its members' probabilities, and the row tells
how far the members are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.analysis.damage import tier_by_token
from qat.analysis.labels import damage_by_class_tier, halves, label_metrics, label_reliability
from qat.cabinet.objective import Objective
from qat.errors import UserError
from qat.model.wiring import arguments
from qat.quantize.plan import digest_of

MACRO_F1 = Objective("macro_f1", "macro_f1", 0.005, True, "delta_macro_f1", "classes")
SPREAD = ("macro_f1", "accuracy", "mcc", "val_loss")  # of an ensemble's members


class Ensemble(nn.Module):
    """Models of several seeds as one: logits (S, B, K), or a mapping of such."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [member(*args, **kwargs) for member in self.members]
        if not isinstance(outputs[0], Mapping):
            return torch.stack(outputs)
        return {
            name: torch.stack([output[name] for output in outputs])
            for name, value in outputs[0].items()
            if isinstance(value, Tensor)
        }


@dataclass(frozen=True)
class Labels:
    """``targets`` (N,): class of each text. ``training_counts`` (K,): how often training saw each
    class, which is what tiers are cut by (None: as often as among ``targets``); its length is the
    number of classes. ``in_search`` (N,) bool, half A, where temperatures are searched; None: of
    every label every other text. UserError for labels that cannot be judged."""

    targets: np.ndarray
    num_classes: int
    names: Sequence[str] = ()
    is_ordered: bool = False
    training_counts: np.ndarray | None = None
    in_search: np.ndarray | None = None
    setting: str = "labels"

    def __post_init__(self) -> None:
        def named(k: int) -> str:
            return repr(self.names[k]) if k < len(self.names) else str(k)

        targets = np.asarray(self.targets)
        if not len(targets):
            raise UserError(f"{self.setting}: there are no texts")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            odd = low if low < 0 else high
            raise UserError(
                f"{self.setting}: label {odd}, but the model's head has {self.num_classes} classes"
            )
        counts = np.bincount(targets, minlength=self.num_classes)
        once = np.flatnonzero(counts == 1)
        if len(once):
            raise UserError(
                f"{self.setting}: label {named(int(once[0]))} occurs once: temperatures are "
                "searched on one half and judged on the other; give 2 texts of it or none"
            )
        if self.in_search is not None:
            for half, name in ((self.in_search, "A"), (~self.in_search, "B")):
                missing = np.setdiff1d(targets, targets[half])
                if len(missing):
                    raise UserError(
                        f"{self.setting}: label {named(int(missing[0]))} is missing in half {name}"
                    )

    @property
    def half_a(self) -> np.ndarray:
        return halves(self.targets) if self.in_search is None else self.in_search

    @property
    def tiers(self) -> np.ndarray:
        counts = self.training_counts
        if counts is None:
            counts = np.bincount(self.targets, minlength=self.num_classes)
        return tier_by_token(np.asarray(counts))


@dataclass(frozen=True)
class LabelledTask:
    """``batches``: what the model is called with, all texts in the order of the labels; ``heads``:
    name -> labels, of a model with one head under any name. ``num_bins`` of the reliability
    diagram, ``seed`` and ``resamples`` of the bootstrap."""

    batches: Sequence[Any]
    heads: Mapping[str, Labels]
    num_bins: int = 15
    seed: int = 0
    resamples: int = 2_000
    objective: Objective = field(default=MACRO_F1)

    def read(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Keys of a row, and the predictions (N,) of each head."""
        logits = self.logits(model)
        found: dict[str, Any] = {}
        for at, (name, labels) in enumerate(self.heads.items()):
            metrics = self._metrics(logits[name], labels)
            found |= metrics if at == 0 else {f"{name}_{key}": v for key, v in metrics.items()}
        predicted = {name: combined(of_head).argmax(1).numpy() for name, of_head in logits.items()}
        return found, predicted

    def _metrics(self, logits: Tensor, labels: Labels) -> dict[str, Any]:
        if not logits.isfinite().all():
            return {"macro_f1": float("nan")}
        targets = torch.from_numpy(np.asarray(labels.targets)).long()
        one = combined(logits)
        found = label_metrics(one, targets, labels.is_ordered)
        found |= label_reliability(one, targets, labels.half_a, self.num_bins)
        if logits.dim() == 3:
            members = [label_metrics(member, targets, False) for member in logits]
            for key in SPREAD:
                values = [member[key] for member in members]
                found[f"{key}_of_seeds"] = values
                found[f"{key}_spread"] = max(values) - min(values)
        return found

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for at, (name, labels) in enumerate(self.heads.items()):
            tiers = damage_by_class_tier(
                labels.targets, (before[name], after[name]), labels.tiers, self.seed, self.resamples
            )
            found["tiers" if at == 0 else f"{name}_tiers"] = tiers
        return found

    @torch.no_grad()
    def logits(self, model: nn.Module) -> dict[str, Tensor]:
        """Head -> float32 logits (N, K), or (S, N, K) of an ensemble, on the CPU. UserError if the
        model has not as many classes as the labels, or texts are missing."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.heads}
        for batch in self.batches:
            args, kwargs = arguments(batch)
            output = model(*args, **kwargs)
            for name, labels in self.heads.items():
                part = _of_head(output, name, len(self.heads) == 1)
                if part.size(-1) != labels.num_classes:
                    raise UserError(
                        f"{labels.setting}: the labels have {labels.num_classes} classes, the "
                        f"model's head {part.size(-1)}"
                    )
                parts[name].append(part.float().cpu())
        logits = {name: torch.cat(found, dim=-2) for name, found in parts.items()}
        for name, labels in self.heads.items():
            if logits[name].size(-2) != len(labels.targets):
                raise UserError(
                    f"{labels.setting}: {len(labels.targets)} labels of "
                    f"{logits[name].size(-2)} texts"
                )
        return logits

    def identity(self) -> dict[str, Any]:
        said = {
            f"{name}.{what}": torch.from_numpy(np.asarray(of_it))
            for name, labels in self.heads.items()
            for what, of_it in (("targets", labels.targets), ("tiers", labels.tiers),
                                ("half_a", labels.half_a))
        }  # fmt: skip
        return {
            "labels_sha256": digest_of(said),
            "ordered": [name for name, labels in self.heads.items() if labels.is_ordered],
            "num_bins": self.num_bins, "seed": self.seed, "resamples": self.resamples,
        }  # fmt: skip


def combined(logits: Tensor) -> Tensor:
    """Logits (N, K) of a model; of an ensemble (S, N, K) the log of its mean probabilities."""
    if logits.dim() == 2:
        return logits
    return logits.log_softmax(-1).logsumexp(0) - np.log(len(logits))


def _of_head(output: Any, name: str, is_only: bool) -> Tensor:
    if isinstance(output, Mapping):
        if name in output:
            found: Tensor = output[name]
            return found
        if is_only and "logits" in output:
            return output["logits"]
        raise UserError(f"heads: the model gives {', '.join(output)}, and no {name}")
    if isinstance(output, Tensor) and is_only:
        return output
    raise UserError(f"heads: the model gives a {type(output).__name__}; give a mapping of logits")
