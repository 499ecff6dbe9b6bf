"""benchmarks/qat_price.py: every arm trains, and its ratio to float training is in the table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from qat.quantize.gradients import rule_kinds
from tests.conftest import ROOT


@pytest.mark.parametrize("asked", [pytest.param("", marks=pytest.mark.slow), "--gradients"])
def test_the_table_names_every_arm(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import qat_price

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(qat_price, "ROOT", tmp_path)
    monkeypatch.setattr(qat_price, "WARM_STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["qat_price.py", "tiny", "--steps", "2", *asked.split()])
    qat_price.main()
    arms = {"off", *(rule_kinds() if asked else qat_price.GRIDS)}
    arms |= {"distilled"} if asked else {"rd", "rd, measuring", "torchao int8"}
    row = json.loads((tmp_path / "logs" / "qat_price.json").read_text())
    assert set(row["seconds_and_ratio"]) == arms
    printed = capsys.readouterr().out
    for arm, (seconds, ratio) in row["seconds_and_ratio"].items():
        assert f"{arm:18} " in printed
        assert seconds > 0
        assert math.isfinite(ratio)
    assert row["seconds_and_ratio"]["off"][1] == 1.0
    assert set(row["stalls"]) == (set() if asked else {*qat_price.GRIDS, "torchao int8"})
