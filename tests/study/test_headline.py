"""The verdict in a sentence says what the numbers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from qat.study.findings import Contrast, Ledger, Treatment, headline_of
from qat.study.law import BestShare
from qat.study.significance import interval, verdict


def treatment(name: str, deltas: Sequence[float], is_qat: bool = True) -> Treatment:
    by_seed = dict(enumerate(deltas))
    found = verdict(deltas, [0.0] * len(deltas), 0.003)
    alike = Contrast("none", by_seed, {}, by_seed, found)
    return Treatment(name, name, None, "int6", is_qat, by_seed, {}, {}, alike, None)


PAYS, COSTS, OPEN = [-0.010, -0.011, -0.012], [0.010, 0.011, 0.012], [-0.01, 0.01, 0.001]


@pytest.mark.parametrize(
    ("treatments", "said"),
    [
        ([], "No arm has a baseline to compare with."),
        ([treatment("a", PAYS)], "training with QAT is better with a (by 0.0110 bits per byte "
         "[0.0085, 0.0135]) (3 seeds)."),
        ([treatment("a", COSTS)], "QAT is worse with a (by 0.0110 bits per byte [0.0085, 0.0135])"),
        ([treatment(n, OPEN) for n in "abc"], "QAT is not decided for a, b and c (3 seeds). "),
        ([treatment("a", [0.01])], "not decided for a (one seed: 0.0100 bits per byte worse)."),
        ([treatment("a", PAYS, is_qat=False)], "Without QAT a change is better with a (by 0.0110"),
        ([treatment("a", OPEN), treatment("b", PAYS)], "QAT is better with b (by 0.0110 bits per "
         "byte [0.0085, 0.0135]) and not decided for a (3 seeds). Decided at"),
        ([treatment("a", OPEN), treatment("b", [-0.01])], "not decided for a and b (one seed: "
         "0.0100 bits per byte better) (1 to 3 seeds)."),
    ],
)  # fmt: skip
def test_stored_alike(treatments: list[Treatment], said: str) -> None:
    assert said in headline_of(treatments, [])


def test_equal_steps_and_equal_bytes() -> None:
    arm = treatment("a", OPEN)
    arm = replace(arm, equal_bytes=treatment("a", COSTS).alike)
    zero, pays = interval(OPEN), interval(PAYS)
    ledger = Ledger("a", True, zero, zero, zero, zero, pays, "measured")
    assert headline_of([arm], [ledger]) == (
        "At equal wallclock and stored in the same way, training with QAT is not decided for a (3 "
        "seeds); at equal updates, as if QAT took no time, it is better with a (by 0.0110 bits per "
        "byte [0.0085, 0.0135]) (3 seeds); at equal bytes, beside the budget solver's plan of the "
        "baseline, it is worse with a (by 0.0110 bits per byte [0.0085, 0.0135]) (3 seeds)."
    )
    counted = headline_of([arm], [ledger], has_clock=False)
    assert counted.startswith("At equal updates and stored in the same way")
    assert "as if QAT took no time" not in counted
    estimated = replace(ledger, is_measured=False)
    assert "at equal updates" not in headline_of([arm], [estimated])


def test_of_many_arms_without_an_effect_few_studies_declare_one() -> None:
    """14 arms, each decided by its own interval: half of all studies would."""
    random = np.random.default_rng(11)
    declared = []
    for _ in range(500):
        effects = [interval(3e-4 * random.standard_normal(5)) for _ in range(14)]
        said = headline_of([], [Ledger(f"arm{at}", True, *[effect] * 5, "measured")
                                for at, effect in enumerate(effects)])  # fmt: skip
        declared.append("better with" in said or "worse with" in said)
    assert 0.03 < np.mean(declared) < 0.07


FORKED_STD = 3e-4  # bits per byte, of forked arms of 8 bits less their trunk (logs/LOG.md)


@pytest.mark.parametrize(
    ("effect", "least", "most"),
    [
        (5e-4, 0.77, 0.82),  # 79.3 % by the power of the t test; 80 % at 0.505 thousandths
        (6e-4, 0.88, 0.93),
        (0.0, 0.03, 0.06),
    ],
)
def test_what_five_forked_seeds_declare(effect: float, least: float, most: float) -> None:
    random = np.random.default_rng(2)
    declared = []
    for _ in range(800):
        said = headline_of([treatment("a", effect + FORKED_STD * random.standard_normal(5))], [])
        declared.append("worse with a" in said or "better with a" in said)
    assert least < np.mean(declared) < most


def test_how_several_arms_are_decided_is_said_once() -> None:
    said = headline_of([treatment("a", PAYS), treatment("b", PAYS)], [])
    assert said.endswith(
        " (3 seeds). Decided at 5 % after Holm over the arms of a clause, beside plain 95 % "
        "intervals."
    )
    assert "Holm" not in headline_of([treatment("a", PAYS)], [])
    # Alone it is decided (p = 0.03), among four it is not.
    weak = [-0.010, -0.014, -0.006]
    assert "better with a" in headline_of([treatment("a", weak)], [])
    among = headline_of([treatment(name, weak) for name in "abcd"], [])
    assert "not decided for a, b, c and d" in among


def test_each_clause_says_its_own_seeds() -> None:
    """Those of the solver lack a seed, and one arm of the ledger another."""
    arm = replace(treatment("a", PAYS), equal_bytes=treatment("a", COSTS[:2]).alike)
    ledger = Ledger("a", True, *[interval(OPEN)] * 5, "measured")
    fewer = replace(ledger, name="b", at_equal_steps=interval(OPEN[:2]))
    first, steps, at_bytes = headline_of([arm], [ledger, fewer]).split("; ")
    assert first.endswith(" (3 seeds)")
    assert steps.endswith("it is not decided for a and b (2 to 3 seeds)")
    assert " (2 seeds). Decided" in at_bytes


def test_the_best_share_beside_the_law() -> None:
    best = BestShare(0.15, 0.1, 0.25, 0.0134, 4.7312)
    assert headline_of([], [], {"int4": best}) == (
        "Of the shares tried on int4 the best is 15 % (95 % 10 % to 25 %) of the run, and arXiv "
        "2509.22935 predicts 1.34 % for 4.73 tokens per parameter byte."
    )
