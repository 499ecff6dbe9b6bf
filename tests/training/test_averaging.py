"""Averages against numpy's, through resumption, and in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qat.artifact.container import read_artifact
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.quantize.switch import QatSwitch
from qat.training.averaging import Averaging, Mean
from qat.training.checkpoint import load_checkpoint
from qat.training.loop import TrainingLoop
from tests.conftest import result_of

RUNS = Path("logs/runs")


def test_means_are_numpys() -> None:
    values = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32)
    plain, moving = Mean(None), Mean(0.9)
    expected = values[0]
    for number, value in enumerate(values):
        for mean in (plain, moving):
            mean.add({"w": torch.from_numpy(value)})
        expected = value if number == 0 else 0.9 * expected + 0.1 * value
    np.testing.assert_allclose(plain.tensors["w"], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(moving.tensors["w"], expected, atol=1e-6)


def test_the_first_update_is_copied_not_shared() -> None:
    w = torch.zeros(2)
    mean = Mean(None)
    mean.add({"w": w})
    w += 1
    assert mean.tensors["w"].tolist() == [0.0, 0.0]


def test_when() -> None:
    swa = Averaging("swa", 0.0, start_fraction=0.5, every_steps=5, of="masters")
    assert [swa.is_due(*at) for at in ((5, 0.4), (9, 0.6), (10, 0.6), (13, 1.0))] == [
        False, False, True, True
    ]  # fmt: skip
    assert not Averaging("none").is_due(5, 1.0)


def test_snapped_averages_what_a_file_would_hold() -> None:
    plan = build_plan({"w": (4, 8)}, {"g": Grid(bits=4)}, {"*": "g"})
    switch, masters = QatSwitch(plan), {"w": torch.randn(4, 8)}
    average = Averaging("ema", 0.9, 0.0, 1, "snapped")
    average.add(masters, switch)
    assert torch.equal(average.weights.tensors["w"], masters["w"])  # QAT is off
    on = Averaging("ema", 0.9, 0.0, 1, "snapped")
    switch.refresh(masters, is_on=True)
    on.add(masters, switch)
    assert torch.equal(on.weights.tensors["w"], plan.snap(masters)["w"])


@pytest.mark.parametrize(
    ("qat", "of"),
    [
        ("none", "masters"), ("lsq4", "snapped"),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in [("none", "snapped"), ("int4", "masters"), ("int4", "snapped"),
                       ("lsq4", "masters")]),
    ],
)  # fmt: skip
def test_the_average_is_what_is_stored(of: str, qat: str, train, program) -> None:
    asked = [f"qat={qat}", "averaging=swa", "averaging.every_steps=2", f"averaging.of={of}"]
    assert train(*asked, "run_name=r").code == 0
    state = load_checkpoint(RUNS / "r" / "checkpoint.ckpt")
    assert state is not None
    average = state["averaging"]["weights"]
    assert average["count"] == 2  # of 12 updates, number 10 and 12 (from 9 on)
    artifact = read_artifact(RUNS / "r" / "artifact.qat")
    stored = artifact.plan.snap(average["tensors"], state["averaging"]["learned_scales"]["tensors"])
    assert all(torch.equal(stored[name], w) for name, w in artifact.weights.items())
    last = artifact.plan.snap(state["weights"], state["learned_scales"])
    assert any(not torch.equal(last[name], w) for name, w in artifact.weights.items())
    row = result_of(RUNS / "r")
    assert row["val_bpb_last_float"] != row["val_bpb_float"]
    assert row["val_bpb_last_snapped"] != row["val_bpb_artifact"]
    scored = program("eval.py", "task=report", "runs=logs/runs/*")
    assert f"swa of {of}" in scored.out


@pytest.mark.slow
def test_an_average_survives_a_crash(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["qat=lsq4", "averaging=ema", "checkpoint.every_steps=4", "max_steps=16"]
    assert train(*asked, "run_name=whole").code == 0
    update, crashed = TrainingLoop._update, []

    def dies(self: TrainingLoop) -> None:
        if self.progress.step == 13 and not crashed:
            crashed.append(True)
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(TrainingLoop, "_update", dies)
    assert train(*asked, "run_name=torn").code == 130
    assert program("train.py", "resume=torn").code == 0
    whole, torn = ((RUNS / name / "artifact.qat").read_bytes() for name in ("whole", "torn"))
    assert whole == torn


def test_without_averaging_nothing_is_kept(train) -> None:
    assert train("run_name=r").code == 0
    state = load_checkpoint(RUNS / "r" / "checkpoint.ckpt")
    assert state is not None
    assert state["averaging"]["weights"] == {"count": 0, "tensors": {}}
    assert result_of(RUNS / "r")["val_bpb_last_float"] is None
