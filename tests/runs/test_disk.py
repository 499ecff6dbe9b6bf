"""Disks that are full and folders of others: a line, and nothing in the way of the next try."""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat.artifact.container import write_whole
from qat.budget.budget import Budget
from qat.errors import UserError, of_system
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.runs import run_folder
from qat.runs.result import Result
from qat.runs.run_folder import read_metrics
from qat.runs.storing import export
from qat.runs.training_run import COLUMNS, MetricsFile, TrainingRun
from qat.settings.checks import _check_runs_dir
from qat.text.shards import ShardWriter
from qat.text.source import from_cache, from_text
from qat.training.checkpoint import load_checkpoint
from tests.runs.test_resume import Crash

RUNS = Path("logs/runs")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to write more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_rows_of_a_trunk_are_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    """The next try would take half of them for all that there were."""
    trunk, folder = tmp_path / "trunk", tmp_path / "tail"
    rows = [",".join(COLUMNS), *(f"{step},2.0,{step}.0,1.0,0" for step in range(1, 3000))]
    for made in (trunk, folder):
        made.mkdir()
    (trunk / run_folder.METRICS).write_text("\n".join(rows) + "\n")
    run: Any = SimpleNamespace(folder=folder)
    asked = run, run_folder.METRICS, 2000, COLUMNS, trunk
    with files_of_at_most(10_000), pytest.raises((OSError, UserError)):
        TrainingRun._rows_of_steps(*asked)
    assert not (folder / run_folder.METRICS).exists()
    TrainingRun._rows_of_steps(*asked)
    assert len(read_metrics(folder / run_folder.METRICS)) == 2000


def test_a_folder_is_claimed_whole_or_not_at_all(tmp_path: Path) -> None:
    def describe(folder: Path) -> None:
        (folder / run_folder.CONFIG).write_text("seed: 1")

    def killed(folder: Path) -> None:
        describe(folder)
        raise Crash

    with pytest.raises(UserError, match=r"cannot write there .No space left on device"):
        run_folder.claim(tmp_path, "mine", "", full)
    assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # kill -9 cleans nothing up
        with pytest.raises(Crash):
            run_folder.claim(tmp_path, "mine", "", killed)
    assert len(list(tmp_path.iterdir())) == 1
    assert run_folder.run_folders(tmp_path) == []
    assert run_folder.claim(tmp_path, "mine", "", describe) == tmp_path / "mine"
    with pytest.raises(UserError, match=r"run_name=mine: .* is there already; give another name"):
        run_folder.claim(tmp_path, "mine", "", describe)
    names = [run_folder.claim(tmp_path, None, "other", describe).name for _ in range(2)]
    assert names == ["other", "other-2"]
    assert [p.name for p in run_folder.run_folders(tmp_path)] == ["mine", "other", "other-2"]


@pytest.mark.parametrize("name", ["CONFIG", "CHOICES", "OVERRIDES"])
def test_a_disk_that_is_full_for_a_run_is_one_line(
    name: str, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, at = Path.write_text, getattr(run_folder, name)
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda path, *a, **k: (full if path.name == at else write)(path, *a, **k),
    )
    done = train("run_name=mine", "max_steps=1")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "error: runs_dir=logs/runs: cannot write there (No space left on device)" in done.err
    assert list(RUNS.iterdir()) == []


def test_a_log_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = run_folder.open_log(tmp_path)
    log = logging.getLogger("qat")
    monkeypatch.setattr(log, "disabled", False)
    try:
        monkeypatch.setattr(handler, "flush", full)
        for number in range(3):
            log.warning("line %d", number)
        handler.close()
    finally:
        log.removeHandler(handler)
    err = capsys.readouterr().err
    assert err.count("train.log: No space left on device") == 1
    assert "Traceback" not in err


def test_an_artifact_that_does_not_fit_the_disk_is_one_line(tmp_path: Path) -> None:
    plan = build_plan({"w": (64, 64)}, {"grid": Grid(bits=8)}, {"*": "grid"})
    encoded = plan.encode({"w": torch.randn(64, 64)})
    path = tmp_path / "artifact.qat"
    with files_of_at_most(1000), pytest.raises(UserError, match=r"artifact\.qat: File too large"):
        export(encoded, {}, "zlib", path, Budget(10**6))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_full_or_anothers(
    train, tmp_path: Path, cache_dir: Path, prepared_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", full)
        done = train(f"data.cache_dir={tmp_path / 'small'}", "max_steps=1")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "small: cannot write there (No space left on device)" in done.err
    assert not (tmp_path / "logs").exists()
    assert [path.suffix for path in (tmp_path / "small").iterdir()] == [".lock"]

    def not_ours(*_: object) -> None:
        raise AssertionError("nothing is locked or written where all is there")

    monkeypatch.setattr("filelock.FileLock.acquire", not_ours)
    identity = {"cache_key": prepared_text.name}
    assert from_cache(identity, cache_dir) is not None
    text = list((cache_dir.parent / "corpus").glob("*.txt"))
    found = from_text([str(text[0])], 320, 0.05, cache_dir)
    assert found.tokenizer.parent == prepared_text


@pytest.mark.slow
def test_a_checkpoint_that_is_something_else(train, program) -> None:
    assert train("run_name=r", "max_steps=2").code == 0
    (RUNS / "r" / "result.json").unlink()
    path = RUNS / "r" / "checkpoint.ckpt"
    for other in ([1, 2], {"w": torch.ones(2)}):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"no checkpoint of this program; put the run's own"):
            load_checkpoint(path)
    done = program("train.py", "resume=r")
    assert done.code == 2
    assert "Traceback" not in done.err
    path.write_bytes(path.read_bytes()[:-300])
    done = program("train.py", "resume=r")
    assert done.code == 0
    assert "is damaged" in done.err
    assert "no checkpoint to go on from: the run begins again with its first step" in done.err


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_a_row_that_was_cut_off_says_how_to_write_it_again(kept: int, tmp_path: Path) -> None:
    write_whole(tmp_path / "result.json", b'{"run_name": "r", "status": "finished", "x": 1}'[:kept])
    with pytest.raises(UserError, match=r"without the file, resume=\S+ writes it anew"):
        Result.read(tmp_path)


DAMAGE = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "binary": lambda whole: b"\xff\xfe\x00",
    "a list": lambda whole: b"[1, 2]",
    "a number": lambda whole: b"3",
    "null": lambda whole: b"null",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.CHOICES])
def test_settings_that_are_damaged_are_one_line_with_a_remedy(
    name: str, damage: str, finished: Path, tmp_path: Path, program
) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    for kept in (run_folder.CONFIG, run_folder.CHOICES):
        (folder / kept).write_bytes((finished / kept).read_bytes())
    (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    done = program("train.py", "resume=torn")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "damaged" in done.err
    assert "start" in done.err
    assert "anew" in done.err


def test_a_row_of_metrics_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    """By a kill in the middle of a line; its first digit may be that of an earlier step."""
    path = tmp_path / "metrics.csv"
    path.write_text(",".join(COLUMNS) + "\n1,3.0,0.1,1.0,0\n2,2.9,0.2,1.0,0\n1")
    MetricsFile(path, first_step=2)
    assert path.read_text().splitlines()[1:] == ["1,3.0,0.1,1.0,0", "2,2.9,0.2,1.0,0"]


def test_a_folder_that_cannot_be_is_refused_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/runs"):
        with pytest.raises(UserError, match=r"cannot write there \(.*/file is not a folder\)"):
            _check_runs_dir(str(tmp_path / name))

    def not_ours_to_look_into(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "inside"))

    monkeypatch.setattr(Path, "stat", not_ours_to_look_into)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"^runs_dir=\S+/inside: cannot write there"):
        _check_runs_dir(str(tmp_path / "inside"))


def test_what_a_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with files_of_at_most(1_000), pytest.raises(OSError, match="File too large") as refused:
        write_whole(tmp_path / "a.qat", bytes(10_000))
    assert of_system(refused.value) == f"{tmp_path / 'a.qat'}: File too large"


def test_a_folder_that_nobody_may_write_is_refused_before_the_text_is_read(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is mounted to be read; the superuser may write all others."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    done = train(f"runs_dir={tmp_path}/new/runs", "data.files=[no.txt]")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert f"/new/runs: cannot write there ({tmp_path} is not ours to write)" in done.err
