"""Sweeps leave one folder per job, failures too; the report pairs arms with baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.artifact.container import read_artifact
from tests.conftest import result_of

RUNS = Path("logs/runs")


def sweep_folders() -> list[Path]:
    (sweep,) = RUNS.iterdir()
    return sorted(p for p in sweep.iterdir() if p.is_dir())


def rows() -> list[dict]:
    (sweep,) = RUNS.iterdir()
    return json.loads((sweep / "report.json").read_text())


def test_the_fields_own_sweep(train, tmp_path: Path) -> None:
    """qat=none exports int8 itself; the report stores it on int6 too, for the int6 arm."""
    done = train("-m", "qat=none,int8,int6", "seed=1,2", "qat.start_step=5", "max_steps=8")
    assert done.code == 0, done.err
    assert {p.name for p in tmp_path.iterdir()} == {"logs"}
    folders = sweep_folders()
    assert len(folders) == 6
    assert all((folder / "result.json").is_file() for folder in folders)
    table = rows()
    exported = [row for row in table if row["exported"]]
    assert len(table) == 8
    assert [(row["seed"], row["grid"]) for row in exported] == [(1, "int6"), (2, "int6")]
    for row in table:
        if row["qat"] != "none":
            assert row["delta_bpb"] is not None, row
            base = [
                r for r in table
                if r["qat"] == "none" and (r["seed"], r["grid"]) == (row["seed"], row["grid"])
            ]  # fmt: skip
            assert len(base) == 1
            expected = row["val_bpb_artifact"] - base[0]["val_bpb_artifact"]
            assert row["delta_bpb"] == pytest.approx(expected, abs=1e-12)
    (sweep,) = RUNS.iterdir()
    files = sorted(sweep.glob("*/exports/*.qat"))
    assert len(files) == 2
    assert all(read_artifact(path).plan.on_grid[0].grid.bits == 6 for path in files)
    assert (sweep / "report.md").read_text().count("\n") == 2 + 8
    for folder in folders:
        assert len([p for p in folder.rglob("*") if "artifact" in p.name]) == 1


def test_exported_baseline_equals_a_run_that_stored_itself_there(train, program) -> None:
    train("qat=none", "grid=int6", "run_name=own", "max_steps=8")
    train("qat=none", "run_name=plain", "max_steps=8")
    train("qat=int6", "run_name=arm", "max_steps=8")
    done = program("eval.py", "task=report", "runs=logs/runs/[pa]*")
    assert done.code == 0, done.err
    table = json.loads((RUNS / "report.json").read_text())
    exported = next(row for row in table if row["exported"])
    own = result_of(RUNS / "own")
    assert exported["val_bpb_artifact"] == pytest.approx(own["val_bpb_artifact"], abs=1e-12)
    (file,) = (RUNS / "plain" / "exports").glob("*.qat")
    assert file.read_bytes() == (RUNS / "own" / "artifact.qat").read_bytes()


def test_a_failed_and_an_oversize_job_are_rows_and_the_rest_runs(train) -> None:
    done = train("-m", "limit_bytes=16000000,1000", "max_steps=2")
    assert done.code == 3
    assert sorted(row["status"] for row in rows()) == ["finished", "oversize"]


def test_a_job_whose_data_is_bad_is_recorded_and_the_others_run(train, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n")
    done = train("-m", "data.files=[bad.jsonl],[${oc.env:GOOD_TEXT}]", "max_steps=2")
    assert done.code == 2, done.err
    table = rows()
    assert sorted(row["status"] for row in table) == ["failed", "finished"]
    failed = next(row for row in table if row["status"] == "failed")
    assert "bad.jsonl, line 1" in failed["error"]


@pytest.fixture(autouse=True)
def _good_text(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD_TEXT", str(corpus))


def test_nothing_starts_if_one_job_is_impossible(train, tmp_path: Path) -> None:
    done = train("-m", "seed=1,2", "model.dim=64,66")
    assert done.code == 2
    assert "model.dim = 66" in done.err
    assert not (tmp_path / "logs").exists()


def test_an_experiment_is_one_yaml(train) -> None:
    done = train("-m", "experiment=main_job", "max_steps=4")
    assert done.code == 0, done.err
    assert [(row["qat"], row["grid"]) for row in rows()] == [("none", "int6"), ("int6", "int6")]
    assert train("-m", "experiment=main_job", "qat=int8").code == 2


def test_a_run_that_died_is_a_row_too(train, program) -> None:
    train("run_name=alive", "max_steps=2")
    dead = RUNS / "dead"
    dead.mkdir()
    (dead / "config.yaml").write_text("seed: 3\n")
    done = program("eval.py", "task=report", "runs=logs/runs/*")
    assert done.code == 0, done.err
    table = json.loads((RUNS / "report.json").read_text())
    assert [row["status"] for row in table] == ["finished", "unfinished"]


def test_unequal_settings_do_not_pair(train, program) -> None:
    train("run_name=base", "max_steps=4")
    train("qat=int8", "run_name=arm", "max_steps=5")
    program("eval.py", "task=report", "runs=logs/runs/*")
    table = json.loads((RUNS / "report.json").read_text())
    assert all(row["delta_bpb"] is None for row in table)
    assert any("no baseline" in row["note"] for row in table)


def test_wandb_offline_holds_the_row(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train("logger=wandb", "qat=int6", "run_name=w", "max_steps=2").code == 0
    (file,) = (RUNS / "w").rglob("run-*.wandb")
    raw = file.read_bytes()
    for key in ("val_bpb_artifact", "qat_never_started", "seed1337", "artifact_bytes"):
        assert key.encode() in raw, key
