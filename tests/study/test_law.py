"""The best share of QAT: the published fit, and what resampled seeds say of a measured one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.study.law import A, best_share, predicted_share


@pytest.mark.parametrize(("tokens", "share"), [(10, 0.0538), (100, 0.2319), (1000, 0.3775)])
def test_the_fit_as_published(tokens: float, share: float) -> None:
    s_qat = math.exp(math.log(tokens) - A / math.log(tokens))  # as it is written there
    assert predicted_share(tokens) == pytest.approx(s_qat / tokens)
    assert predicted_share(tokens) == pytest.approx(share, abs=1e-4)


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_it_grows_with_the_tokens(one: float, other: float) -> None:
    less, more = sorted((predicted_share(min(one, other)), predicted_share(max(one, other))))
    assert 0 <= less <= more < 1
    assert predicted_share(min(one, other)) <= predicted_share(max(one, other))


def test_a_clear_winner_and_a_close_race() -> None:
    clear = best_share({0.5: [1.0, 1.1, 1.2], 0.25: [0.9, 1.0, 1.1], 0.1: [1.3, 1.4, 1.5]}, 10)
    assert (clear.share, clear.low, clear.high) == (0.25, 0.25, 0.25)
    assert clear.predicted == predicted_share(10)
    close = best_share({0.5: [1.0, 0.9, 1.0], 0.25: [0.9, 1.0, 0.99], 0.1: [3.0, 3.0, 3.0]}, 10)
    assert (close.share, close.low, close.high) == (0.25, 0.25, 0.5)
    assert best_share({0.5: [1.0], 0.25: [0.9]}, 10).low is None
