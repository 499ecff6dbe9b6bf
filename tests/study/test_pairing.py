"""Which file of a baseline a QAT run is compared with."""

from __future__ import annotations

from qat.runs.result import conditions, differing
from qat.study.files import Target, as_large, beside

ROUNDED = {"fill": False, "coder": "mix"}
FILLED = ROUNDED | {"fill": True}


def settings(artifact: dict, limit_bytes: int, grid: str = "int8", to_bytes: bool = False) -> dict:
    return {
        "grid": grid, "plan": {}, "artifact": artifact, "limit_bytes": limit_bytes,
        "qat": {"to_bytes": to_bytes},
    }  # fmt: skip


def test_a_filled_file_is_one_for_its_limit_alone() -> None:
    own = settings(FILLED, 1000)
    assert Target(own, 1000).is_file_of(own)
    assert not Target(own, 2000).is_file_of(own)
    assert Target(own, None).is_file_of(own)
    assert not Target(settings(FILLED, 1000, "int6"), 1000).is_file_of(own)
    assert not Target(settings(ROUNDED, 1000), 1000).is_file_of(own)


def test_of_the_rules_of_a_plan_the_first_that_fits_counts() -> None:
    rules = {"tok_emb.*": "fp16", "*.weight": "grid", "*": "fp16"}
    one, other = (
        settings(ROUNDED, 1000) | {"plan": {"rules": dict(ordered)}}
        for ordered in (rules.items(), reversed(rules.items()))
    )
    assert differing(conditions(one), conditions(one)) == []
    assert differing(conditions(one), conditions(other)) == ["plan.rules"]
    assert differing(conditions(one), conditions(other), ["plan"]) == []
    assert Target(one).is_file_of(one)
    assert not Target(one).is_file_of(other)


def test_beside_what_fills_a_limit_the_solver_fills_it_too() -> None:
    own, trained = settings(ROUNDED, 9000), settings(ROUNDED, 1000, "rd", to_bytes=True)
    target = beside(own, trained, trained)
    assert target.limit_bytes == 1000
    assert (target.settings["grid"], target.settings["artifact"]) == ("int8", FILLED)
    alike = settings(ROUNDED, 1000, "int6")
    assert beside(own, alike, alike) == Target(alike, None)


def test_at_equal_bytes_the_baseline_has_those_of_the_file() -> None:
    """Of what fell short of its limit too: training to bytes may leave a fifth of it."""
    own = settings(ROUNDED, 9000)
    target = as_large(own, 820)
    assert target.limit_bytes == 820
    assert target.settings["artifact"] == FILLED | {"method": "round", "gptq_bit_price": 0.0}
    assert target.settings["grid"] == "int8"
