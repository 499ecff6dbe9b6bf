"""Sweeps leave one folder per job, failures too; the report pairs arms with baselines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from qat.artifact.container import read_artifact
from qat.golf.bundle import count_code_bytes
from qat.settings import command_line
from qat.study.find_out import find_out_runs
from tests.conftest import GOLF, ROOT, first_on_path, result_of

RUNS = Path("logs/runs")


def sweep_folders() -> list[Path]:
    (sweep,) = RUNS.iterdir()
    return sorted(p for p in sweep.iterdir() if p.is_dir())


def rows() -> list[dict]:
    (sweep,) = RUNS.iterdir()
    return json.loads((sweep / "report.json").read_text())


@pytest.mark.slow
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
    report = (sweep / "report.md").read_text()
    assert report.count("\n") == 2 + 8 + 2 * 2
    for arm, grid in (("int8", "int8"), ("int6", "int6")):
        deltas = [row["delta_bpb"] for row in table if row["qat"] == arm]
        line = f"{arm} on {grid} (seeds 1, 2): {sum(deltas) / 2:+.5f} bpb against none (95 % "
        assert line in report
        assert line in done.out
    for folder in folders:
        assert len([p for p in folder.rglob("*") if "artifact" in p.name]) == 1


@pytest.mark.slow
def test_a_sweep_named_by_its_time_keeps_that_name(train, monkeypatch: pytest.MonkeyPatch) -> None:
    check = command_line.Jobs.begin_sweep

    def slow_check(*asked):
        checked = check(*asked)
        time.sleep(1.1)
        return checked

    monkeypatch.setattr(command_line.Jobs, "begin_sweep", slow_check)
    done = train("-m", "qat=none,int6", "max_steps=2")
    assert done.code == 0, done.err
    assert len(sweep_folders()) == 2
    assert len(rows()) == 3


# As /proc/net spells 127.0.0.1, in IPv6 too, and ::1.
LOOPBACK = {
    "0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"
}  # fmt: skip


def listened_at(mark: str) -> set[str]:
    """Addresses at which processes listen whose environment has ``mark``, a name and its value."""
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    address_of = {f"socket:[{row[9]}]": row[1].split(":")[0] for row in lines if row[3] == "0A"}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found |= {os.readlink(handle) for handle in (process / "fd").iterdir()}
        except OSError:  # it has ended, or is another user's
            continue
    return {address_of[name] for name in found & set(address_of)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["parallel", "ray_local"])
def test_a_launchers_processes_make_the_same_rows(
    launcher: str, tiny: list[str], tmp_path: Path, train
) -> None:
    """The same files as one run after another in this process; a job that fails has a row; nobody
    outside this machine is listened to."""
    asked = ["qat=none,int6", "model.init_from=null,no.pt", "max_steps=8"]
    mark = f"SWEEP_OF_TEST={tmp_path}"
    environment = os.environ | first_on_path(ROOT) | {"SWEEP_OF_TEST": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *tiny, f"hydra/launcher={launcher}", *asked,
         "sweep_name=apart"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    addresses: set[str] = set()
    while process.poll() is None:
        addresses |= listened_at(mark)
        time.sleep(0.5)
    out, err = process.communicate()
    assert process.returncode == 2, err
    assert "QAT against its no-QAT baseline" in out
    assert bool(addresses) == (launcher == "ray_local")
    assert addresses <= LOOPBACK
    assert train("-m", *asked, "sweep_name=inline").code == 2

    def stored(sweep: str) -> list[tuple[str, bytes | None]]:
        return sorted(
            (result_of(path.parent)["error"] or "", (path.parent / "artifact.qat").read_bytes()
             if result_of(path.parent)["exit_code"] == 0 else None)
            for path in (RUNS / sweep).glob("*/result.json")
        )  # fmt: skip

    assert len(stored("apart")) == 4
    assert stored("apart") == stored("inline")


def test_launcher_mistakes(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for launcher, message in (
        ("slurm", "no srun here"),
        ("nope", "if it is a plugin, install it"),
    ):
        done = train("-m", "qat=none,int6", f"hydra/launcher={launcher}")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert message in done.err
        assert not RUNS.exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_failed_and_an_oversize_job_are_rows_and_the_rest_runs(train) -> None:
    done = train("-m", f"limit_bytes=16000000,{count_code_bytes() + 1000}", "max_steps=2")
    assert done.code == 3
    assert sorted(row["status"] for row in rows()) == ["finished", "oversize"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_died_is_a_row_too(train, program) -> None:
    train("run_name=alive", "max_steps=2")
    dead = RUNS / "dead"
    dead.mkdir()
    (dead / "config.yaml").write_text("seed: 3\n")
    done = program("eval.py", "task=report", "runs=logs/runs/*")
    assert done.code == 0, done.err
    table = json.loads((RUNS / "report.json").read_text())
    assert [row["status"] for row in table] == ["finished", "unfinished"]


@pytest.mark.slow
def test_unequal_settings_do_not_pair(train, program) -> None:
    train("run_name=base", "max_steps=4")
    train("qat=int8", "run_name=arm", "max_steps=5")
    program("eval.py", "task=report", "runs=logs/runs/*")
    table = json.loads((RUNS / "report.json").read_text())
    assert all(row["delta_bpb"] is None for row in table)
    assert any("base differs in max_steps" in row["note"] for row in table)


def report_rows(program) -> list[dict]:
    done = program("eval.py", "task=report", "runs=logs/runs/*")
    assert done.code == 0, done.err
    return json.loads((RUNS / "report.json").read_text())


def change(run: str, **values: object) -> None:
    file = RUNS / run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hardware": "another machine, 2 ranks"}, "base differs in hardware"),
        ({"data": {"train": "0", "val": "0", "tokenizer": "0"}}, "base differs in data.tok"),
    ],
)
def test_other_hardware_and_other_text_do_not_pair(values, named: str, train, program) -> None:
    train("run_name=base", "max_steps=2")
    train("qat=int8", "run_name=arm", "max_steps=2")
    assert [row["delta_bpb"] is None for row in report_rows(program)] == [True, False]
    change("base", **values)
    arm = report_rows(program)[-1]
    assert arm["delta_bpb"] is None
    assert named in arm["note"]


@pytest.mark.slow
def test_the_same_text_at_another_path_pairs(train, program, corpus: Path, tmp_path: Path) -> None:
    train("run_name=base", "max_steps=2")
    (tmp_path / "copy.txt").write_bytes(corpus.read_bytes())
    train("qat=int8", "run_name=arm", "max_steps=2", "data.files=[copy.txt]")
    assert report_rows(program)[-1]["delta_bpb"] is not None


@pytest.mark.slow
def test_of_two_baselines_none_is_picked(train, program) -> None:
    for name in ("base1", "base2"):
        train(f"run_name={name}", "max_steps=2")
    train("qat=int6", "run_name=arm", "max_steps=2")
    change("base2", val_bpb_artifact=9.0, val_bpb_float=9.0)
    table = report_rows(program)
    arm = table[-1]
    exported = [row["val_bpb_artifact"] for row in table if row["exported"]]
    assert len(exported) == 2
    expected = arm["val_bpb_artifact"] - sum(exported) / 2
    assert arm["delta_bpb"] == pytest.approx(expected, abs=1e-12)
    assert "mean of 2 baselines" in arm["note"]
    assert [row["run_name"] for row in table] == ["base1", "base2", "base1", "base2", "arm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    ["truncate", *(pytest.param(d, marks=pytest.mark.slow) for d in ("empty", "remove"))],
)
def test_a_baseline_that_cannot_be_exported_is_a_note(damage: str, train, program) -> None:
    train("run_name=base", "max_steps=2")
    train("qat=int6", "run_name=arm", "max_steps=2")
    checkpoint = RUNS / "base" / "checkpoint.ckpt"
    if damage == "remove":
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[: 0 if damage == "empty" else 1000])
    base, arm = report_rows(program)
    assert "baseline base has no file on this grid" in arm["note"]
    assert "checkpoint.ckpt" in arm["note"]
    assert base["status"] == "finished"


@pytest.mark.slow
def test_the_report_needs_no_training_text_and_no_working_folder(
    train, program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in GOLF.glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    given = ("data.files=null", "data.train_files=fineweb_train_*.bin", "model.vocab_size=512",
             "data.val_files=fineweb_val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model",
             "max_steps=1")  # fmt: skip
    assert train(*given, "run_name=base").code == 0
    assert train(*given, "qat=int6", "qat.start_step=0", "run_name=arm").code == 0
    for file in tmp_path.glob("fineweb_train_*"):
        file.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, _, arm = find_out_runs(
        [tmp_path / RUNS / name for name in ("base", "arm")], Console(quiet=True)
    ).rows
    assert arm["delta_bpb"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"unknown": 1}',
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("", "[]", '{"run_name": "x"}')),
    ],
)
def test_a_damaged_row_is_said_and_the_others_shown(content: str, train, program) -> None:
    train("run_name=good", "max_steps=1")
    train("run_name=bad", "max_steps=1")
    (RUNS / "bad" / "result.json").write_text(content)
    table = report_rows(program)
    assert [row["status"] for row in table] == ["finished", "unreadable"]


@pytest.mark.slow
def test_an_export_whose_file_is_gone_is_made_again(train, program) -> None:
    train("run_name=base", "max_steps=1")
    train("qat=int6", "qat.start_step=0", "run_name=arm", "max_steps=1")
    first = report_rows(program)
    (file,) = (RUNS / "base" / "exports").glob("*.qat")
    file.unlink()
    assert report_rows(program) == first
    assert file.is_file()


def test_a_report_that_cannot_be_written_is_one_line(train, program) -> None:
    train("run_name=base", "max_steps=1")
    (RUNS / "report.md").mkdir()
    done = program("eval.py", "task=report", "runs=logs/runs/*")
    assert done.code == 2
    assert "cannot write logs/runs/report.md" in done.err


@pytest.mark.slow
def test_runs_of_several_folders_are_reported_in_runs_dir(train, program, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert train(f"runs_dir={folder}", "run_name=r", "max_steps=1").code == 0
    assert program("eval.py", "task=report", "runs=*/r").code == 0
    assert (RUNS / "report.md").is_file()
    assert not (tmp_path / "report.md").exists()


@pytest.mark.slow
def test_a_sweep_into_a_folder_with_glob_signs(train) -> None:
    done = train("-m", "seed=1,2", "runs_dir='a[1]'", "max_steps=1")
    assert done.code == 0, done.err
    assert len(list(Path("a[1]").glob("*/report.md"))) == 1


@pytest.mark.slow
def test_what_fills_a_limit_is_compared_with_the_solver_at_that_limit(train) -> None:
    """A baseline rounded on the grid of qat=rd would be several times as large."""
    limit = count_code_bytes() + 32_000
    assert train("qat=none", "run_name=a").code == 0
    filled = {
        "b": ("qat=rd", f"limit_bytes={limit}"),
        "c": ("qat=int6", "artifact.fill=true", f"limit_bytes={limit + 4000}"),
    }
    for name, asked in filled.items():
        assert train(*asked, f"run_name={name}").code == 0
    table = find_out_runs([RUNS / name for name in "abc"], Console(quiet=True)).rows
    by_limit = {row["limit_bytes"]: row for row in table if row["exported"]}
    assert sorted(by_limit) == [limit, limit + 4000]
    for row in table:
        if row["qat"] != "none":
            beside = by_limit[row["limit_bytes"]]
            assert beside["grid"] == "int8+fill"
            assert 0.998 * row["limit_bytes"] <= beside["total_bytes"] <= row["limit_bytes"]
            expected = row["val_bpb_artifact"] - beside["val_bpb_artifact"]
            assert row["delta_bpb"] == pytest.approx(expected, abs=1e-12)
