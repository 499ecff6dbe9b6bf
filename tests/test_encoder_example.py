"""``examples/encoder``: what it is asked about, and its one command."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

SCRIPT = ROOT / "examples" / "encoder" / "run.py"
SMALL = ("--seconds", "4", "--more-seconds", "1", "--most", "20", "--dim", "32", "--layers", "1",
         "--variants", "fp32", "rtn_int4", "gptq_int4", "qat_*")  # fmt: skip


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("encoder_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verses_are_apart_and_every_book_is_asked_about(example) -> None:
    train, test = example.read_verses(25)
    assert len(set(map(tuple, test.ids)) & set(map(tuple, train.ids))) < 0.01 * len(test.ids)
    counts = np.bincount(test.labels["book"], minlength=66)
    assert counts.min() == counts.max() == example.LEAST_TEST
    sections = dict(zip(test.labels["book"], test.labels["section"], strict=True))
    names = {0: 0, 4: 0, 5: 1, 18: 2, 26: 3, 27: 4, 39: 5, 42: 5, 43: 6, 44: 7, 57: 8, 65: 9}
    assert {book: int(sections[book]) for book in names} == names  # Psalms, Daniel, Acts, ...
    batch = test.batch(np.array([0, 5]))
    assert (batch["input_ids"].ne(0) == batch["attention_mask"].bool()).all()


def test_padding_changes_no_answer(example) -> None:
    torch.manual_seed(0)
    model = example.BookReader(32, 1).eval()
    ids = torch.randint(3, 4096, (1, 9))
    wider = torch.cat([ids, torch.zeros(1, 15, dtype=torch.long)], 1)
    with torch.no_grad():
        one = model(ids, torch.ones_like(ids))
        other = model(wider, (wider != 0).long())
    for head, classes in example.HEADS.items():
        assert one[head].shape == (1, classes)
        torch.testing.assert_close(one[head], other[head], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_one_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", "found", *SMALL]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                         env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = {
        row["variant"]: row
        for row in json.loads((tmp_path / "found/cabinet/results.json").read_text())
    }
    assert list(rows) == [
        "fp32", "rtn_int4", "gptq_int4",
        "qat_int8", "qat_int6", "qat_int4", "qat_int3", "qat_mxfp4",
    ]  # fmt: skip
    assert {row["status"] for row in rows.values()} == {"measured"}
    assert rows["fp32"]["section_kappa"] > 0
    report = (tmp_path / "found/cabinet/REPORT.md").read_text()
    for title in ("Promises", "What QAT buys", "Where damage lands", "Temperature"):
        assert f"## {title}" in report
    assert "data:image/png" in (tmp_path / "found/cabinet/report.html").read_text()
    assert "artifact_bytes <=" in (tmp_path / "found/cabinet/CHOICE.txt").read_text()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                           env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "updates in" in run.stdout
    assert "updates in" not in again.stdout
    assert "fp32:" not in again.stderr
