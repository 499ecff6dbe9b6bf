"""Distillation: the loss against a plain statement of it, the teacher, and what stays as it was."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.settings import checks
from qat.training.distill import Distillation, distilled_loss
from tests.conftest import result_of

RUNS = Path("logs/runs")
SPEC = ModelSpec(320, 2, 64, 4, 2, 2, True)


def losses(name: str) -> list[str]:
    with open(RUNS / name / "metrics.csv") as file:
        return [row["train_loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_cross_entropy_and_divergence_written_out(
    weight: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    targets = torch.randint(7, (2, 5), generator=generator)
    free = student.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            p = torch.softmax(teacher[b, t].double() / temperature, 0)
            log_q = torch.log_softmax(free[b, t] / temperature, 0)
            divergence = sum(p[v] * (p[v].log() - log_q[v]) for v in range(7))
            hard = -torch.log_softmax(free[b, t], 0)[targets[b, t]]
            total = total + (1 - weight) * hard + weight * temperature**2 * divergence
    (total / 10).backward()
    student.requires_grad_()
    loss = distilled_loss(student, targets, teacher, weight, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / 10, rel=1e-5)
    torch.testing.assert_close(student.grad.double(), free.grad, atol=1e-6, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    model = GPT(SPEC)
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    distillation = Distillation(1.0, 2.0, model)
    distillation._weights = {n: w.detach().clone() for n, w in weights.items()}
    ids = torch.randint(320, (2, 16))
    loss = distillation.loss(weights, ids, ids.roll(-1, 1))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert all(w.grad is None or w.grad.abs().max() < 1e-6 for w in weights.values())


def test_it_begins_at_the_switch(train) -> None:
    asked = ["qat=int4", "qat.start_step=5"]
    assert train(*asked, "run_name=plain").code == 0
    assert train(*asked, "qat.distill.weight=0.5", "run_name=taught").code == 0
    plain, taught = losses("plain"), losses("taught")
    assert plain[:5] == taught[:5]
    assert plain[5:] != taught[5:]
    result = result_of(RUNS / "taught")
    assert (result["on_grid_share"], result["qat_steps"]) == (1.0, 7)


@pytest.mark.slow
def test_a_teacher_survives_a_kill(train) -> None:
    asked = ["qat=int4", "qat.start_step=4", "qat.distill.weight=1", "qat.distill.temperature=2"]
    assert train(*asked, "run_name=whole").code == 0
    assert train(*asked, "run_name=trunk", "fork.keep_steps=[8]").code == 0
    assert train(*asked, "run_name=rest", "fork.run=trunk", "fork.step=8").code == 0
    assert losses("rest")[-4:] == losses("whole")[-4:]
    same = [(RUNS / name / "artifact.qat").read_bytes() for name in ("whole", "rest")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_another_run_teaches(train, tmp_path: Path) -> None:
    assert train("model.dim=96", "run_name=large", "qat=none", "grid=int8").code == 0
    asked = ["qat=int4", "qat.start_step=5", "qat.distill.weight=1"]
    assert train(*asked, "qat.distill.teacher=large", "run_name=a").code == 0
    assert train(*asked, "run_name=b").code == 0
    file = (RUNS / "large" / "artifact.qat").resolve()
    assert train(*asked, f"qat.distill.teacher={file}", "run_name=c").code == 0
    assert losses("a") == losses("c")
    assert losses("a")[:5] == losses("b")[:5]
    assert losses("a")[5:] != losses("b")[5:]


def test_a_micro_batch_has_to_leave_room_for_its_logits(train, monkeypatch) -> None:
    monkeypatch.setattr(checks, "MAX_LOGITS", 320 * 100)
    done = train("qat=int4", "qat.distill.weight=1")
    assert done.code == 2
    assert "micro_batch_tokens" in done.err
    assert "give at most 100" in done.err


@pytest.mark.slow
def test_a_teacher_is_known_by_content(train, program) -> None:
    for seed in (1, 2):
        assert train(f"run_name=t{seed}", f"seed={seed}", "max_steps=2", "grid=int8").code == 0
    asked = ["qat=int4", "qat.distill.weight=1", "qat.distill.teacher=t1", "run_name=r"]
    assert train(*asked, "max_steps=4", "qat.start_step=2").code == 0
    (RUNS / "r" / "result.json").unlink()
    shutil.copy(RUNS / "t2" / "artifact.qat", RUNS / "t1" / "artifact.qat")
    done = program("train.py", "resume=r")
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert "the teacher has other weights" in done.err
    (RUNS / "t1" / "artifact.qat").write_bytes(b"QATMODEL and no more")
    done = program("train.py", "resume=r")
    assert done.code == 2
    assert "error: qat.distill.teacher=" in done.err


def test_a_teacher_without_weight_is_refused(train) -> None:
    done = train("qat=int4", "qat.distill.teacher=elsewhere")
    assert done.code == 2
    assert "qat.distill.teacher = elsewhere: it has no weight in the loss" in done.err
