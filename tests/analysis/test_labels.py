"""What is measured of labelled tasks, each number against an independent statement of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qat.analysis.intervals import MIN_FLIPS
from qat.analysis.labels import (
    damage_by_class_tier,
    f1_by_class,
    halves,
    label_metrics,
    label_reliability,
)

# label 0: 3 right, 1 taken for 2; label 1: 2 right, 2 taken for 0; label 2: all 4 taken for 2
CONFUSION = np.array([[3, 0, 1], [2, 2, 0], [0, 0, 4]])


def from_confusion(confusion: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose likeliest class is as the matrix says, and labels."""
    cells = [(label, p) for (label, p), n in np.ndenumerate(confusion) for _ in range(n)]
    targets, predicted = (torch.tensor(part) for part in zip(*cells, strict=True))
    noise = torch.rand(len(cells), len(confusion), generator=torch.Generator().manual_seed(0))
    return noise + 2.0 * F.one_hot(predicted, len(confusion)), targets


def made_up(num_texts: int = 400, num_classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """A long tail, and logits that know something; class 6 is never a label."""
    rng = np.random.default_rng(3)
    shares = 0.5 ** np.arange(num_classes - 1)
    targets = torch.from_numpy(rng.choice(num_classes - 1, num_texts, p=shares / shares.sum()))
    logits = torch.from_numpy(rng.normal(size=(num_texts, num_classes))).float()
    logits[torch.arange(num_texts), targets] += 1.2
    return logits, targets


def test_by_hand_from_a_confusion_matrix() -> None:
    found = label_metrics(*from_confusion(CONFUSION), is_ordered=True)
    assert found["confusion"] == ["3 0 1", "2 2 0", "0 0 4"]
    assert found["accuracy"] == pytest.approx(9 / 12)
    # F1 = 2 right / (labelled + predicted)
    by_class = [2 * 3 / (4 + 5), 2 * 2 / (4 + 2), 2 * 4 / (4 + 5)]
    assert found["f1_by_class"] == pytest.approx(by_class)
    assert found["macro_f1"] == pytest.approx(sum(by_class) / 3)
    # kappa: 1 - observed over expected squared distance, the latter of independent margins
    labelled, predicted = CONFUSION.sum(1), CONFUSION.sum(0)
    squares = np.subtract.outer(np.arange(3), np.arange(3)) ** 2
    expected = np.outer(labelled, predicted) / 12
    kappa = 1 - (squares * CONFUSION).sum() / (squares * expected).sum()
    assert found["kappa"] == pytest.approx(kappa)
    # MCC: the correlation of one-hot labels and predictions
    pairs = 12 * 9 - labelled @ predicted
    spread = np.sqrt((144 - predicted @ predicted) * (144 - labelled @ labelled))
    assert found["mcc"] == pytest.approx(pairs / spread)
    assert "kappa" not in label_metrics(*from_confusion(CONFUSION), is_ordered=False)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    logits, targets = made_up()
    shares = logits.softmax(1).double()
    aucs = []
    for k in targets.unique():
        of_it, others = shares[targets == k, k], shares[targets != k, k]
        over = (of_it[:, None] > others).double() + 0.5 * (of_it[:, None] == others)
        aucs.append(over.mean())
    found = label_metrics(logits, targets, False)["auc"]
    assert found == pytest.approx(float(torch.stack(aucs).mean()), abs=1e-6)


def test_against_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn to compare with")
    for logits, targets in (made_up(), from_confusion(CONFUSION)):
        found = label_metrics(logits, targets, True)
        y, p = targets.numpy(), logits.argmax(1).numpy()
        k = logits.size(1)
        assert found["macro_f1"] == pytest.approx(sk.f1_score(y, p, average="macro"))
        by_class = sk.f1_score(y, p, average=None, labels=range(k), zero_division=0)
        assert found["f1_by_class"] == pytest.approx(by_class.tolist())
        assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(y, p))
        assert found["kappa"] == pytest.approx(sk.cohen_kappa_score(y, p, weights="quadratic"))
        rows = [[int(n) for n in row.split()] for row in found["confusion"]]
        assert rows == sk.confusion_matrix(y, p, labels=range(k)).tolist()
        shares = logits.double().softmax(1).numpy()
        aucs = [sk.roc_auc_score(y == c, shares[:, c]) for c in np.unique(y)]
        assert found["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)
        assert found["val_loss"] == pytest.approx(sk.log_loss(y, shares, labels=range(k)))


def test_a_class_that_never_occurs_counts_for_nothing() -> None:
    logits, targets = made_up()
    logits[:, 6] = -9.0  # not predicted either
    wider = label_metrics(logits, targets, True)
    narrower = label_metrics(logits[:, :6], targets, True)
    for key in ("macro_f1", "mcc", "auc", "kappa", "accuracy"):
        assert wider[key] == pytest.approx(narrower[key], abs=1e-3), key
    assert np.isnan(f1_by_class(targets.numpy(), logits.argmax(1).numpy(), 7)[6])


def test_halves_have_every_label() -> None:
    targets = np.array([2, 0, 2, 1, 1, 0, 2, 1, 2, 0, 5, 5])
    in_a = halves(targets)
    assert in_a.tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0]
    for label in np.unique(targets):
        of_it = in_a[targets == label]
        assert abs(2 * of_it.sum() - len(of_it)) <= 1


def test_a_temperature_is_found_on_one_half_and_judged_on_the_other() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(6000, 4))).float()
    drawn = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(1))
    targets = drawn[:, 0]
    in_a = halves(targets.numpy())
    found = label_reliability(2.0 * logits, targets, in_a, 10)  # twice too sure
    assert found["temperature"] == pytest.approx(2.0, rel=0.05)
    assert not found["temperature_at_edge"]
    assert found["ece_at_temperature"] < 0.03 < found["ece"]
    b = torch.from_numpy(~in_a)
    for suffix, t in (("", 1.0), ("_at_temperature", found["temperature"])):
        scaled = 2.0 * logits[b] / t
        nats = F.cross_entropy(scaled, targets[b])
        assert found[f"nats{suffix}"] == pytest.approx(float(nats), abs=1e-5)
        confidence, predicted = scaled.softmax(1).max(1)
        right = (predicted == targets[b]).double()
        bins = (confidence * 10).long().clamp_max(9)
        ece = sum(
            float((bins == k).double().mean())
            * abs(float(right[bins == k].mean()) - float(confidence[bins == k].double().mean()))
            for k in bins.unique()
        )
        assert found[f"ece{suffix}"] == pytest.approx(ece, abs=1e-5)
    # Labels of half B are none of the temperature's business.
    shuffled = targets.clone()
    shuffled[b] = shuffled[b].flip(0)
    again = label_reliability(2.0 * logits, shuffled, in_a, 10)
    assert again["temperature"] == found["temperature"]
    assert again["nats"] > found["nats"]


def planted(num_flips: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """300 texts of class 0, 100 of 1, 60 of 2; all right but 5 of each; of class 2 ``num_flips``
    more become 0."""
    targets = np.repeat([0, 1, 2], [300, 100, 60])
    before = targets.copy()
    for start in (0, 300, 400):
        before[start : start + 5] = (targets[start] + 1) % 3
    after = before.copy()
    after[405 : 405 + num_flips] = 0
    return targets, before, after


def test_planted_flips_are_found_in_their_tier() -> None:
    targets, before, after = planted(30)
    tier_of = np.array([0, 1, 2])
    found = damage_by_class_tier(targets, (before, after), tier_of, 1, 400)
    assert [found[name]["flipped_predictions"] for name in ("head", "mid", "tail")] == [0, 0, 30]
    tail = found["tail"]
    assert tail["texts"] == 60
    assert tail["delta_accuracy"]["estimate"] == pytest.approx(-0.5)
    # 55 of 60 right, 60 taken for class 2; then 25 of 60, and 30
    f1 = 2 * 55 / (60 + 60), 2 * 25 / (60 + 30)
    assert tail["delta_macro_f1"]["estimate"] == pytest.approx(f1[1] - f1[0])
    assert tail["delta_macro_f1"]["is_real"]
    assert tail["delta_accuracy"]["is_real"]
    assert tail["delta_macro_f1"]["low"] < f1[1] - f1[0] < tail["delta_macro_f1"]["high"] < 0
    # The head gained false alarms but no flip of its own: real by its interval, but not called so.
    head = found["head"]["delta_macro_f1"]
    assert head["high"] < 0
    assert not head["is_real"]
    assert found["mid"]["delta_macro_f1"]["estimate"] == 0.0
    assert found["all"]["accuracy_float"] == pytest.approx(445 / 460)


def test_few_flips_are_not_called_real() -> None:
    tiers = np.array([0, 1, 2])
    for flips in (MIN_FLIPS - 1, MIN_FLIPS):
        targets, before, after = planted(flips)
        tail = damage_by_class_tier(targets, (before, after), tiers, 1, 200)["tail"]
        assert tail["delta_macro_f1"]["high"] < 0  # the interval excludes 0 either way
        assert tail["delta_macro_f1"]["is_real"] == (flips == MIN_FLIPS)
    before, after = targets.copy(), targets.copy()
    before[5:35], after[35:65] = 1, 1  # others are wrong, but as many: the interval holds 0
    same = damage_by_class_tier(targets, (before, after), tiers, 1, 200)["all"]
    assert same["flipped_predictions"] == 60
    assert same["delta_macro_f1"]["low"] < 0 < same["delta_macro_f1"]["high"]
    assert not same["delta_macro_f1"]["is_real"]


def test_intervals_are_those_of_resampled_texts() -> None:
    """Against a bootstrap written out, with its own draws."""
    logits, targets = made_up()
    y, before = targets.numpy(), logits.argmax(1).numpy()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    after = (logits + noise).argmax(1).numpy()
    tier_of = np.array([0, 1, 1, 2, 2, 2, 2])
    found = damage_by_class_tier(y, (before, after), tier_of, 0, 1000)
    rng = np.random.default_rng(99)
    drawn = []
    for _ in range(1000):
        at = rng.integers(0, len(y), len(y))
        f1 = []
        for p in (before, after):
            right = [(p[at] == y[at])[y[at] == c].sum() for c in (1, 2)]
            both = [(y[at] == c).sum() + (p[at] == c).sum() for c in (1, 2)]
            f1.append(np.mean([2 * r / b for r, b in zip(right, both, strict=True)]))
        drawn.append(f1[1] - f1[0])
    low, high = np.quantile(drawn, [0.025, 0.975])
    change = found["mid"]["delta_macro_f1"]
    assert change["low"] == pytest.approx(low, abs=0.02)
    assert change["high"] == pytest.approx(high, abs=0.02)
