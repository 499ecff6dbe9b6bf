"""Calibration against plain loops, and temperatures against a search with all logits at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from qat.analysis import reliability as calibration
from qat.analysis.reliability import (
    TemperatureSearch,
    at_temperature,
    expected_calibration_error,
    reliability_bins,
)

# Few distinct values, so that ties, edges of bins and both ends of [0, 1] come often.
CONFIDENCES = st.one_of(
    st.integers(0, 12).map(lambda k: k / 12), st.floats(0.0, 1.0, width=32), st.just(1.0)
)


def plain_bins(tokens: list[tuple[float, bool]], starts: list[float]) -> list[tuple]:
    """(lower, upper, count, mean confidence, accuracy) with a loop over tokens."""
    limits = list(zip([0.0, *starts], [*starts, 1.0], strict=True))
    held: list[list[tuple[float, bool]]] = [[] for _ in limits]
    for token in tokens:
        index = max(k for k, (lower, _) in enumerate(limits) if lower <= token[0])
        held[index].append(token)
    return [
        (
            *limits[k],
            len(inside),
            math.fsum(c for c, _ in inside) / len(inside),
            sum(right for _, right in inside) / len(inside),
        )
        for k, inside in enumerate(held)
        if inside
    ]


@given(
    tokens=st.lists(st.tuples(CONFIDENCES, st.booleans()), min_size=1, max_size=60),
    num_bins=st.integers(1, 15),
    equal_mass=st.booleans(),
    seed=st.integers(0, 9),
)
def test_bins_are_those_of_a_plain_loop_in_any_order(
    tokens: list[tuple[float, bool]], num_bins: int, equal_mass: bool, seed: int
) -> None:
    tokens = [(float(np.float32(c)), right) for c, right in tokens]
    ranked = sorted(c for c, _ in tokens)
    if equal_mass:
        starts = sorted({ranked[k * len(ranked) // num_bins] for k in range(1, num_bins)})
    else:
        starts = [k / num_bins for k in range(1, num_bins)]
    expected = plain_bins(tokens, starts)
    shuffled = [tokens[k] for k in np.random.default_rng(seed).permutation(len(tokens))]
    for order in (tokens, shuffled):
        confidence = np.array([c for c, _ in order], dtype=np.float32)
        correct = np.array([right for _, right in order])
        bins = reliability_bins(confidence, correct, num_bins, equal_mass)
        assert len(bins) == len(expected)
        for b, values in zip(bins, expected, strict=True):
            found = (b.lower, b.upper, b.count, b.mean_confidence, b.accuracy)
            assert found == pytest.approx(values, rel=1e-12, abs=1e-300)
        error = sum(n * abs(right - mean) for _, _, n, mean, right in expected) / len(tokens)
        assert expected_calibration_error(bins) == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("equal_mass", [True, False])
def test_chunks_add_up(equal_mass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    confidence = generator.random(10_000, dtype=np.float32)
    correct = generator.random(10_000) < confidence
    whole = reliability_bins(confidence, correct, 15, equal_mass)
    monkeypatch.setattr(calibration, "CHUNK_TOKENS", 777)
    for a, b in zip(whole, reliability_bins(confidence, correct, 15, equal_mass), strict=True):
        assert (a.lower, a.upper, a.count, a.accuracy) == (b.lower, b.upper, b.count, b.accuracy)
        assert a.mean_confidence == pytest.approx(b.mean_confidence, rel=1e-12)


def test_distinct_confidences_make_bins_of_equal_mass() -> None:
    confidence = np.random.default_rng(2).permutation(np.linspace(0.1, 1.0, 1000))
    bins = reliability_bins(confidence, confidence > 0.5, 8, equal_mass=True)
    assert [b.count for b in bins] == [125] * 8


@pytest.mark.parametrize("equal_mass", [True, False])
def test_error_is_near_zero_if_calibrated_and_the_shift_if_not(equal_mass: bool) -> None:
    generator = np.random.default_rng(3)
    confidence = generator.random(200_000, dtype=np.float32)
    honest = generator.random(200_000) < confidence
    proud = generator.random(200_000) < confidence - 0.1 * (confidence > 0.2)
    assert expected_calibration_error(reliability_bins(confidence, honest, 15, equal_mass)) < 0.006
    error = expected_calibration_error(reliability_bins(confidence, proud, 15, equal_mass))
    assert error == pytest.approx(0.08, abs=0.004)


def test_no_tokens_and_impossible_confidences() -> None:
    assert reliability_bins(np.zeros(0), np.zeros(0, dtype=bool), 15, equal_mass=True) == []
    with pytest.raises(ValueError, match="no tokens"):
        expected_calibration_error([])
    for bad in (math.nan, -0.1, 1.1):
        for equal_mass in (True, False):
            with pytest.raises(ValueError, match="between 0 and 1"):
                reliability_bins(np.array([0.5, bad]), np.ones(2, dtype=bool), 15, equal_mass)
    with pytest.raises(ValueError, match="3 confidences of 2 tokens"):
        reliability_bins(np.zeros(3), np.ones(2, dtype=bool), 15, equal_mass=False)


def exact_temperature(logits_NV: Tensor, targets_N: Tensor) -> float:
    """The search that the fit stands for: float64, all logits at every step."""
    z, rows = logits_NV.double(), torch.arange(len(logits_NV))

    def nats(log_beta: float) -> float:
        log_p = torch.log_softmax(z * math.exp(log_beta), dim=-1)
        return -float(log_p[rows, targets_N].mean())

    limits = (-math.log(4), math.log(4))
    found = minimize_scalar(nats, bounds=limits, method="bounded", options={"xatol": 1e-9})
    return math.exp(-found.x)


def logits_of(kind: str, num_tokens: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    normal = torch.randn(num_tokens, vocab_size, generator=generator)
    if kind == "uniform":
        return 60 * torch.rand(num_tokens, vocab_size, generator=generator) - 30
    if kind == "peaked":
        normal[:, 0] += 4 + 5 * torch.rand(num_tokens, generator=generator)
    return 3 * normal


@pytest.mark.parametrize("true_temperature", [0.7, 1.0, 1.7])
@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("normal", 2), ("normal", 50), ("normal", 1024), ("uniform", 2), ("uniform", 50),
     ("uniform", 1024), ("peaked", 50), ("peaked", 1024)],
)  # fmt: skip
def test_one_pass_finds_the_exact_temperature(
    kind: str, vocab_size: int, true_temperature: float
) -> None:
    logits_NV = logits_of(kind, 600, vocab_size)
    probabilities = torch.softmax(logits_NV / true_temperature, dim=-1)
    generator = torch.Generator().manual_seed(7)
    targets_N = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    search = TemperatureSearch()
    search.update(logits_NV, targets_N)
    found = search.best()
    assert found.value == pytest.approx(exact_temperature(logits_NV, targets_N), abs=1e-5)
    assert not found.at_edge


def test_temperature_of_the_labels_is_recovered() -> None:
    logits_NV = logits_of("normal", 40_000, 50)
    generator = torch.Generator().manual_seed(8)
    targets_N = torch.multinomial(torch.softmax(logits_NV / 1.7, -1), 1, generator=generator)[:, 0]
    parts = [TemperatureSearch(), TemperatureSearch()]
    batches = zip(logits_NV.split(7_000), targets_N.split(7_000), strict=True)
    for k, (logits, targets) in enumerate(batches):
        parts[k % 2].update(logits, targets)
    whole = TemperatureSearch()
    whole.sums = parts[0].sums + parts[1].sums  # as all_reduce does
    assert whole.sums.dtype == torch.float64
    assert whole.sums[-1] == 40_000
    assert whole.best().value == pytest.approx(1.7, abs=0.02)
    once = TemperatureSearch()
    once.update(logits_NV, targets_N)
    assert once.best().value == pytest.approx(whole.best().value, abs=1e-6)


@pytest.mark.parametrize(("true_temperature", "edge"), [(0.1, 0.25), (20.0, 4.0)])
def test_an_edge_of_the_range_is_called_one(true_temperature: float, edge: float) -> None:
    logits_NV = logits_of("normal", 2_000, 20)
    generator = torch.Generator().manual_seed(9)
    probabilities = torch.softmax(logits_NV / true_temperature, -1)
    search = TemperatureSearch()
    search.update(logits_NV, torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    assert search.best() == (edge, True)


def test_logits_that_say_nothing_have_no_temperature() -> None:
    for vocab_size in range(1, 40):
        search = TemperatureSearch()
        search.update(torch.full((9, vocab_size), 0.3), torch.arange(9) % vocab_size)
        assert search.best().at_edge
    with pytest.raises(ValueError, match="no tokens"):
        TemperatureSearch().best()
    search.update(torch.full((1, vocab_size), math.nan), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        search.best()


@given(
    temperature=st.floats(0.25, 4.0),
    vocab_size=st.integers(1, 40),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
)
def test_nats_and_confidence_at_a_temperature(
    temperature: float, vocab_size: int, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = offset + 10 * torch.randn(6, vocab_size, generator=generator)
    targets_N = torch.randint(vocab_size, (6,), generator=generator)
    nats_N, confidence_N = at_temperature(logits_NV, targets_N, temperature)
    exact = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
    expected = -exact[torch.arange(6), targets_N]
    torch.testing.assert_close(nats_N.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(confidence_N.double(), exact.amax(-1).exp(), rtol=1e-5, atol=0)
    assert nats_N.dtype == confidence_N.dtype == torch.float32
    assert confidence_N.max() <= 1.0  # as reliability demands
