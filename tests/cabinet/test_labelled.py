"""Labelled tasks through ``cabinet.run``: rows, heads, ensembles, report, choice, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat import cabinet
from qat.analysis.labels import label_metrics
from qat.cabinet import measure
from qat.cabinet.choose_task import choose, objective_of, read_rows
from qat.cabinet.labelled import MACRO_F1, Ensemble, LabelledTask, Labels, combined
from qat.errors import UserError
from tests.cabinet.cabinet_rows import CEILINGS

CLASSES, SECTIONS = 5, 3


class TwoHeads(nn.Module):
    """Bag of words, two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.book, self.section = nn.Linear(32, CLASSES), nn.Linear(32, SECTIONS)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x_BC = self.body(self.embedding(input_ids).mean(1))
        return {"book": self.book(x_BC), "section": self.section(x_BC)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_ceilings", lambda _: CEILINGS)


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 40, (90, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": part} for part in ids.split(30)]


def answers(model: nn.Module, noise: float = 0.0) -> dict[str, np.ndarray]:
    """What the model says itself, less some that are drawn: labels that it mostly knows."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches()]
    found = {}
    for head, classes in (("book", CLASSES), ("section", SECTIONS)):
        said = torch.cat([output[head] for output in outputs]).argmax(1).numpy()
        drawn = rng.integers(0, classes, len(said))
        found[head] = np.where(rng.random(len(said)) < noise, drawn, said)
    return found


def task_of(model: nn.Module) -> LabelledTask:
    known = answers(model, 0.4)
    labels = {
        "book": Labels(known["book"], CLASSES, training_counts=np.array([5, 90, 2, 30, 1])),
        "section": Labels(known["section"], SECTIONS, is_ordered=True),
    }
    return LabelledTask(batches(), labels, num_bins=5, resamples=100)


@pytest.fixture
def model() -> TwoHeads:
    torch.manual_seed(3)
    model = TwoHeads().eval()
    with torch.no_grad():
        model.embedding.weight *= 8  # so that it says more than its biases
    return model


@pytest.mark.slow
def test_rows_report_and_choice(model: TwoHeads, tmp_path: Path) -> None:
    task = task_of(model)
    rows = {
        row["variant"]: row
        for row in cabinet.run(
            model, batches(), task, folder=tmp_path, keep=["book", "section"], repeats=1,
            variants=["fp32", "rtn_int8", "rtn_ternary", "gptq_int4"],
        )
    }  # fmt: skip
    logits = torch.cat([model(**batch)["book"] for batch in batches()]).detach()
    expected = label_metrics(logits, torch.from_numpy(task.heads["book"].targets), False)
    assert rows["fp32"]["macro_f1"] == expected["macro_f1"]
    assert rows["fp32"]["gap_macro_f1"] == 0.0
    assert "kappa" not in rows["fp32"]
    assert 0 < rows["fp32"]["section_kappa"] < 1
    ternary = rows["rtn_ternary"]
    assert ternary["gap_macro_f1"] == ternary["macro_f1"] - rows["fp32"]["macro_f1"] < 0
    assert ternary["tiers"]["all"]["flipped_predictions"] > 0
    assert ternary["section_tiers"].keys() >= {"all"}
    assert rows["fp32"]["tiers"] is None
    text = (tmp_path / "REPORT.md").read_text()
    for word in ("macro F1", "section_kappa", "delta_macro_f1", "gap_macro_f1 >= -0.005"):
        assert word in text, word
    assert {"tiers.png", "reliability.png"} <= {path.name for path in tmp_path.glob("*.png")}
    assert objective_of(tmp_path) == MACRO_F1
    found = read_rows(tmp_path)
    size, f1 = rows["fp32"]["disk_bytes"] - 1, rows["rtn_int8"]["macro_f1"]
    chosen = choose(found, {"artifact_bytes": size, "macro_f1": f1}, MACRO_F1).chosen
    assert chosen is not None
    assert chosen["macro_f1"] == max(r["macro_f1"] for n, r in rows.items() if n != "fp32")
    assert choose(found, {"macro_f1": 1.5}, MACRO_F1).chosen is None


@pytest.mark.slow
def test_rows_of_other_texts_or_labels_are_not_mixed(model: TwoHeads, tmp_path: Path) -> None:
    task = task_of(model)

    def again(changed: LabelledTask) -> None:
        cabinet.run(model, batches(), changed, folder=tmp_path, variants=["fp32"], repeats=1)

    again(task)
    again(task)
    assert len((tmp_path / "REPORT.md").read_text().splitlines()) < 200
    other = {"input_ids": torch.zeros(30, 8, dtype=torch.long)}
    with pytest.raises(UserError, match="another inputs_sha256"):
        again(replace(task, batches=[*batches()[:2], other]))
    book = task.heads["book"]
    with pytest.raises(UserError, match="another labels_sha256"):
        again(
            replace(
                task, heads={**task.heads, "book": replace(book, targets=book.targets[::-1].copy())}
            )
        )
    with pytest.raises(UserError, match="another ordered"):
        again(replace(task, heads={**task.heads, "book": replace(book, is_ordered=True)}))


@pytest.mark.slow
def test_the_choice_as_typed(model: TwoHeads, tmp_path: Path, program) -> None:
    cabinet.run(
        model, batches(), task_of(model), folder=tmp_path, variants=["fp32", "rtn_ternary"],
        repeats=1,
    )  # fmt: skip
    rows = {row["variant"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    needed = (rows["fp32"]["macro_f1"] + rows["rtn_ternary"]["macro_f1"]) / 2
    done = program(
        "eval.py", "task=choose", f"cabinet={tmp_path}", f"constraints={{macro_f1: {needed}}}"
    )
    assert done.code == 0, done.err
    assert "macro_f1 >= " in done.out
    assert f"chosen: fp32, of most macro_f1 ({rows['fp32']['macro_f1']:.5f})" in done.out
    assert "fails macro_f1" in done.out


def test_an_ensemble_tells_how_far_its_members_are_apart(model: TwoHeads) -> None:
    other = TwoHeads().eval()
    task = task_of(model)
    found, predicted = task.read(Ensemble([model, other]))
    alone = [task.read(member)[0] for member in (model, other)]
    assert found["macro_f1_of_seeds"] == pytest.approx([row["macro_f1"] for row in alone])
    spread = abs(alone[0]["macro_f1"] - alone[1]["macro_f1"])
    assert found["macro_f1_spread"] == pytest.approx(spread)
    shares = sum(
        torch.cat([member(**b)["book"] for b in batches()]).softmax(1) for member in (model, other)
    )
    assert (predicted["book"] == shares.argmax(1).numpy()).all()
    logits = torch.stack([task.logits(member)["book"] for member in (model, other)])
    assert combined(logits).exp().sum(1).allclose(torch.ones(90))
    assert "macro_f1_spread" not in alone[0]


def test_labels_that_cannot_be_judged() -> None:
    two, three = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1, 2])
    asked: list[tuple[str, dict[str, Any]]] = [
        ("labels: label 'Jude' occurs once", {"targets": three, "num_classes": 3,
                                              "names": ["Mark", "Luke", "Jude"]}),
        ("labels: label 2 occurs once", {"targets": three, "num_classes": 3}),
        ("a.jsonl: label 2, but the model's head has 2 classes",
         {"targets": three, "num_classes": 2, "setting": "a.jsonl"}),
        ("labels: label -1, but", {"targets": two - 1, "num_classes": 2}),
        ("labels: there are no texts", {"targets": two[:0], "num_classes": 2}),
        ("labels: label 1 is missing in half A",
         {"targets": two, "num_classes": 2, "in_search": np.array([True, True, False, False])}),
    ]  # fmt: skip
    for line, wrong in asked:
        with pytest.raises(UserError) as caught:
            Labels(**wrong)
        assert str(caught.value).startswith(line)
        assert "\n" not in str(caught.value)


class NanOfZero(TwoHeads):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        odd = (input_ids == 0).any(1, keepdim=True)
        outputs = super().forward(input_ids).items()
        return {head: logits.masked_fill(odd, float("nan")) for head, logits in outputs}


def test_a_model_that_does_not_suit_the_labels(model: TwoHeads, tmp_path: Path) -> None:
    known, books = answers(model, 0.5)["section"], answers(model, 0.5)["book"]
    asked: list[tuple[str, dict[str, Labels], list[dict[str, Tensor]]]] = [
        ("labels: the labels have 4 classes, the model's head 3",
         {"book": Labels(books, 5), "section": Labels(known, 4)}, batches()),
        ("labels: 90 labels of 60 texts",
         {"section": Labels(known, 3), "book": Labels(books, 5)}, batches()[:2]),
        ("heads: the model gives book, section, and no verse", {"verse": Labels(known, 3)},
         batches()),
    ]  # fmt: skip
    for line, heads, texts in asked:
        with pytest.raises(UserError) as caught:
            cabinet.run(model, batches(), LabelledTask(texts, heads), folder=tmp_path / "c")
        assert str(caught.value) == line
    first = {"input_ids": torch.ones(30, 8, dtype=torch.long)}
    texts = [first, *batches()[1:]]
    heads = {"section": Labels(known, SECTIONS), "book": Labels(books, CLASSES)}
    with pytest.raises(UserError, match="the float model's macro_f1 is nan, not a number"):
        cabinet.run(NanOfZero().eval(), texts, LabelledTask(texts, heads), folder=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("metrics.json"))
