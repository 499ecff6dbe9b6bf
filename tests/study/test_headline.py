"""The verdict in a sentence says what the numbers say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qat.study.findings import Contrast, Ledger, Treatment, headline_of
from qat.study.law import BestShare
from qat.study.significance import Effect, verdict


def treatment(name: str, deltas: list[float], is_qat: bool = True) -> Treatment:
    by_seed = dict(enumerate(deltas))
    found = verdict(deltas, [0.0] * len(deltas), 0.003)
    alike = Contrast("none", by_seed, {}, by_seed, found)
    return Treatment(name, name, None, "int6", is_qat, by_seed, {}, {}, alike, None)


PAYS, COSTS, OPEN = [-0.010, -0.011, -0.012], [0.010, 0.011, 0.012], [-0.01, 0.01, 0.001]


@pytest.mark.parametrize(
    ("treatments", "said"),
    [
        ([], "No arm has a baseline to compare with."),
        ([treatment("a", PAYS)], "QAT pays for a (-11.0 mbpb, 95 % -13.5 to -8.5)."),
        ([treatment("a", COSTS)], "QAT costs with a (+11.0 mbpb, 95 % +8.5 to +13.5)."),
        ([treatment(n, OPEN) for n in "abc"], "QAT is undecided for a, b and c."),
        ([treatment("a", [0.01])], "QAT is undecided for a (+10.0 mbpb, one seed)."),
        ([treatment("a", PAYS, is_qat=False)], "Without QAT a change pays for a (-11.0 mbpb"),
        ([treatment("a", OPEN), treatment("b", PAYS)], "QAT pays for b (-11.0 mbpb, 95 % -13.5 to "
         "-8.5), is undecided for a."),
    ],
)  # fmt: skip
def test_stored_alike(treatments: list[Treatment], said: str) -> None:
    assert said in headline_of(treatments, [])


def test_equal_steps_and_equal_bytes() -> None:
    arm = treatment("a", OPEN)
    arm = replace(arm, equal_bytes=treatment("a", COSTS).alike)
    zero, pays = Effect(0.0, -1.0, 1.0), Effect(-0.002, -0.003, -0.001)
    ledger = Ledger("a", True, zero, zero, zero, zero, pays, "measured")
    assert headline_of([arm], [ledger]) == (
        "At equal wallclock, stored alike, QAT is undecided for a; at equal steps it pays for a "
        "(-2.0 mbpb, 95 % -3.0 to -1.0); at equal bytes, against the solver's plan, it costs with "
        "a (+11.0 mbpb, 95 % +8.5 to +13.5)."
    )
    estimated = replace(ledger, is_measured=False)
    assert "at equal steps" not in headline_of([arm], [estimated])


def test_the_best_share_beside_the_law() -> None:
    best = BestShare(0.15, 0.1, 0.25, 0.0134, 4.7312)
    assert headline_of([], [], {"int4": best}) == (
        "Of the shares tried on int4 the best is 15 % (95 % 10 % to 25 %) of the run, and arXiv "
        "2509.22935 predicts 1.34 % for 4.73 tokens per parameter byte."
    )
