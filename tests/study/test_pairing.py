"""Which file of a baseline a QAT run is compared with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from qat.budget.budget import Budget
from qat.runs.result import conditions, differing
from qat.settings.schema import StudySettings
from qat.study import files
from qat.study.files import StoredFile, Target, as_large, beside
from qat.study.study import Study

ROUNDED = {"fill": False, "coder": "mix"}
FILLED = ROUNDED | {"fill": True}
FILE = StoredFile(1.5, 2.5, 820, 120, 1000, "rd", None, None)


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
    target = beside(own, trained, trained, FILE)
    assert (target.limit_bytes, target.code_bytes) == (1000, 120)
    assert (target.settings["grid"], target.settings["artifact"]) == ("int8", FILLED)
    alike = settings(ROUNDED, 1000, "int6")
    assert beside(own, alike, alike, FILE) == Target(alike, None)


def test_at_equal_bytes_the_baseline_has_those_of_the_file() -> None:
    """Of what fell short of its limit too: training to bytes may leave a fifth of it."""
    own = settings(ROUNDED, 9000)
    target = as_large(own, FILE)
    assert (target.limit_bytes, target.code_bytes) == (820, 120)
    assert target.settings["artifact"] == FILLED | {"method": "round", "gptq_bit_price": 0.0}
    assert target.settings["grid"] == "int8"


def test_as_much_of_a_limit_is_code_as_was_beside_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = settings(ROUNDED, 1000)
    result = SimpleNamespace(settings=own)
    run = SimpleNamespace(folder=Path("none_s1"), row=result)
    budgets = []

    def export_again(folder: Path, row: object, target: dict, budget: Budget, _: object) -> dict:
        budgets.append(budget)
        return {"val_bpb_artifact": 1.0, "val_loss_artifact": 1.0, "artifact_bytes": 700}

    row = {
        "settings": own, "limit_bytes": 1000, "code_bytes": 150, "artifact_bytes": 800, "grid": "",
        "val_bpb_artifact": 1.0, "val_loss_artifact": 1.0, "storing_code": None,
    }  # fmt: skip
    monkeypatch.setattr(files, "export_again", export_again)
    monkeypatch.setattr(files, "asdict", lambda _: dict(row))
    monkeypatch.setattr(files, "count_code_bytes", lambda: 200)
    study = files.StudyFiles([], Study("s", StudySettings(), [], []), Console(quiet=True))
    study.stored(run, as_large(own, FILE))  # type: ignore[arg-type]
    study.stored(run, Target(settings(ROUNDED, 1000, "int4")))  # type: ignore[arg-type]
    assert budgets == [Budget(820, 120), Budget(1000, 200)]
    study.stored(run, Target(own, 1000, 150))  # type: ignore[arg-type]  # its own file
    study.stored(run, Target(own, 1000, 120))  # type: ignore[arg-type]  # which had less room
    assert budgets[2:] == [Budget(1000, 120)]
