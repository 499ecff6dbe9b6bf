"""What a classifier's logits are worth, and where a variant of it does damage.

F1, MCC, AUC, kappa and confusion matrix are torchmetrics'; reliability and temperature those of
language models (``reliability.py``), with classes in the place of tokens. Macro F1 is the mean over
the classes that occur among labels or predictions, AUC that of each label's class against the rest.

Intervals of a change of macro F1 are a percentile bootstrap over texts, which are drawn once for
both models. F1 is no mean over texts, so each resample counts anew; a class that occurs in none of
a resample's labels and predictions is left out of its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from qat.analysis.damage import TIERS
from qat.analysis.intervals import Interval, is_real, paired_bootstrap
from qat.analysis.reliability import (
    TemperatureSearch,
    at_temperature,
    expected_calibration_error,
    reliability_bins,
)

LEVEL = 0.95


def halves(targets_N: np.ndarray) -> np.ndarray:
    """(N,) bool, half A: of every label every other text, so that both halves have all labels."""
    order = np.argsort(targets_N, kind="stable")
    in_a = np.empty(len(order), dtype=bool)
    starts = np.flatnonzero(np.diff(targets_N[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    in_a[order] = rank % 2 == 0
    return in_a


def label_metrics(logits_NK: Tensor, targets_N: Tensor, is_ordered: bool) -> dict[str, Any]:
    """Of finite logits: ``macro_f1``, ``accuracy``, ``mcc``, ``auc``, ``kappa`` (of ordered labels,
    weighted by squared distance), ``val_loss`` in nats, ``f1_by_class`` (K,), and ``confusion``:
    a line for each label, with how often each class was predicted."""
    num_classes = logits_NK.size(1)
    predicted_N, shares_NK = logits_NK.argmax(1), logits_NK.softmax(1)
    args = (predicted_N, targets_N, num_classes)
    confusion = multiclass_confusion_matrix(*args)
    aucs = [
        binary_auroc(shares_NK[:, k], (targets_N == k).long())
        for k in targets_N.unique().tolist()
        if not (targets_N == k).all()
    ]
    found = {
        "macro_f1": float(multiclass_f1_score(*args, average="macro")),
        "accuracy": float((predicted_N == targets_N).double().mean()),
        "mcc": float(multiclass_matthews_corrcoef(*args)),
        "auc": float(torch.stack(aucs).double().mean()) if aucs else None,
        "val_loss": float(torch.nn.functional.cross_entropy(logits_NK.double(), targets_N)),
        "f1_by_class": multiclass_f1_score(*args, average=None).tolist(),
        "confusion": [" ".join(map(str, row)) for row in confusion.tolist()],
    }
    if is_ordered:
        found["kappa"] = float(multiclass_cohen_kappa(*args, weights="quadratic"))
    return found


def label_reliability(
    logits_NK: Tensor, targets_N: Tensor, in_a: np.ndarray, num_bins: int
) -> dict[str, Any]:
    """The temperature of least loss on half A, and what half B says of it: ``ece`` and
    ``nats`` without and ``..._at_temperature`` with it, and the bins of the diagram without."""
    a = torch.from_numpy(in_a)
    search = TemperatureSearch()
    search.update(logits_NK[a], targets_N[a])
    temperature = search.best()
    logits, targets = logits_NK[~a], targets_N[~a]
    is_right = (logits.argmax(1) == targets).numpy()
    found: dict[str, Any] = {
        "temperature": temperature.value, "temperature_at_edge": temperature.at_edge
    }  # fmt: skip
    for label, value in (("", 1.0), ("_at_temperature", temperature.value)):
        nats, confidence = at_temperature(logits, targets, value)
        bins = reliability_bins(confidence.numpy().clip(0.0, 1.0), is_right, num_bins, False)
        found[f"ece{label}"] = expected_calibration_error(bins)
        found[f"nats{label}"] = float(nats.double().mean())
        if not label:
            found["reliability"] = [asdict(one) for one in bins]
    return found


def f1_by_class(targets_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
    """(K,) float64, NaN for a class that is neither a label nor predicted."""
    right = np.bincount(targets_N[targets_N == predicted_N], minlength=num_classes)
    both = np.bincount(targets_N, minlength=num_classes)
    both = both + np.bincount(predicted_N, minlength=num_classes)
    return np.divide(2.0 * right, both, out=np.full(num_classes, np.nan), where=both > 0)


def damage_by_class_tier(
    targets_N: np.ndarray,
    predicted: Sequence[np.ndarray],
    tier_of: np.ndarray,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """All texts and each tier of classes: name -> changes of accuracy and macro F1, with intervals,
    and flipped predictions.

    ``predicted``: (N,) of the float model, then of the variant; ``tier_of`` (K,): index into TIERS
    of each class. A text is of its label's tier; F1 of a tier is the mean over its classes, and
    counts texts of others that were taken for them. A tier without texts has no entry.
    """
    num_classes = len(tier_of)
    masks = {"all": np.full(num_classes, True)}
    masks |= {name: tier_of == at for at, name in enumerate(TIERS)}
    f1 = [f1_by_class(targets_N, p, num_classes) for p in predicted]
    generator = np.random.default_rng(seed)
    drawn_f1 = np.empty((2, resamples, num_classes))
    for k in range(resamples):
        drawn = generator.integers(0, len(targets_N), len(targets_N))
        for of, p in enumerate(predicted):
            drawn_f1[of, k] = f1_by_class(targets_N[drawn], p[drawn], num_classes)
    right = [p == targets_N for p in predicted]
    flipped = predicted[0] != predicted[1]
    found = {}
    for name, mask in masks.items():
        chosen = mask[targets_N]
        if not chosen.any():
            continue
        num_texts, num_flipped = int(chosen.sum()), int(flipped[chosen].sum())
        accuracy = paired_bootstrap(
            (right[1].astype(np.int8) - right[0])[chosen], np.ones(num_texts), seed, 1.0, resamples
        )
        means = [_mean(of_model[mask]) for of_model in f1]
        change = _interval(means[1] - means[0], drawn_f1[:, :, mask], num_texts)
        found[name] = {
            "texts": num_texts,
            "accuracy_float": float(right[0][chosen].mean()),
            "accuracy_artifact": float(right[1][chosen].mean()),
            "macro_f1_float": means[0],
            "macro_f1_artifact": means[1],
            "delta_accuracy": asdict(accuracy) | {"is_real": is_real(accuracy, num_flipped)},
            "delta_macro_f1": asdict(change) | {"is_real": is_real(change, num_flipped)},
            "flipped_predictions": num_flipped,
        }
    return found


def _mean(f1: np.ndarray) -> float:
    """Over the classes that have one."""
    return float(np.nanmean(f1)) if not np.isnan(f1).all() else 0.0


def _interval(estimate: float, drawn_f1: np.ndarray, num_texts: int) -> Interval:
    """``drawn_f1`` (2, resamples, classes). No bounds where a resample has none of the classes."""
    has_one = ~np.isnan(drawn_f1).all(axis=2)
    if num_texts < 2 or not has_one.all():
        return Interval(estimate, None, None, num_texts)
    means = np.nanmean(drawn_f1, axis=2)
    low, high = np.quantile(means[1] - means[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Interval(estimate, low, high, num_texts)
