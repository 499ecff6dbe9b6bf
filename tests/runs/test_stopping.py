"""A signal ends all that was asked for, at once; the same command goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat.errors import PreemptedError
from qat.runs.run_folder import run_folders
from qat.settings.signals import STOPPING, when_asked_to_stop
from tests.conftest import ROOT, result_of
from tests.runs.test_resume import crash_in

SWEEP = Path("logs/runs/mine")
ASKED = ("-m", "seed=1,2", "max_steps=8", "schedule.warmdown_steps=3")


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """Where the suite itself was started by nohup, or in the background, too."""
    usual = dict.fromkeys(STOPPING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, old in before.items():
        signal.signal(number, old)


def _interrupted(number: int, seen: list[str]) -> None:
    with when_asked_to_stop():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception:  # of somebody on the way, who thinks it is his
            seen.append("taken for a failure")
        finally:
            seen.append("cleaned up")


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_an_exit_that_every_finally_sees(number: int) -> None:
    before, seen = signal.getsignal(number), []
    with pytest.raises(PreemptedError) as stopped:
        _interrupted(number, seen)
    assert seen == ["cleaned up"]
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_nohup_is_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with when_asked_to_stop():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_waits_for_others_is_ended_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python runs in a collective call, so a handler of ours would keep it alive."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with when_asked_to_stop():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "where", "code"),
    [
        (signal.SIGTERM, "training", 143),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                (signal.SIGHUP, "training", 129),
                (signal.SIGTERM, "scoring", 143),
                (signal.SIGINT, "training", 130),
            )
        ),
    ],
)
def test_a_sweep_stops_at_once_and_the_same_command_goes_on(
    number: int, where: str, code: int, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*ASKED, "checkpoint.every_steps=2", "sweep_name=mine"]
    with monkeypatch.context() as patched:
        if where == "training":
            crash_in(patched, 5, lambda: os.kill(os.getpid(), number))
        else:
            patched.setattr(
                "qat.evaluation.score.Scorer.score", lambda *_: os.kill(os.getpid(), number)
            )
        done = train(*asked)
    assert done.code == code, done.err
    assert done.err.splitlines()[-2].startswith("go on with: python train.py ")
    assert "Traceback" not in done.err
    (first,) = run_folders(SWEEP)  # nothing else was started
    assert not (SWEEP / "report.md").exists()

    command = shlex.split(done.err.splitlines()[-2].partition("train.py ")[2])
    done = train(*command)
    assert done.code == 0, done.err
    last = {"training": 6 if number != signal.SIGINT else 4, "scoring": 8}[where]
    assert f"going on after step {last}" in done.err
    one, two = run_folders(SWEEP)
    assert [result_of(run)["seed"] for run in (one, two)] == [1, 2]
    assert one == first
    before = {p: p.read_bytes() for run in (one, two) for p in run.iterdir()}
    done = train(*command)  # nothing is left to do
    assert done.code == 0, done.err
    assert done.out.count("is finished, val_bpb") == 2
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.slow
def test_a_sweep_goes_on_with_its_own_runs_alone(train) -> None:
    done = train(*ASKED, "sweep_name=mine", "seed=1")
    assert done.code == 0, done.err
    before = [p.name for p in run_folders(SWEEP)]
    for more, told in (
        (("max_steps=9",), "with max_steps = 8, which is none of these runs"),
        (("seed=2,3",), "with seed = 1, which is none of these runs"),
        (("checkpoint.every_steps=3",), "with checkpoint.every_steps = None, which is none of"),
    ):
        done = train(*ASKED, "sweep_name=mine", *more)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert told in done.err
        assert [p.name for p in run_folders(SWEEP)] == before
    done = train(*ASKED, "sweep_name=mine", "seed=1,2")  # one more is no other sweep
    assert done.code == 0, done.err
    assert [result_of(run)["seed"] for run in run_folders(SWEEP)] == [1, 2]


@pytest.mark.slow
def test_a_sweep_that_was_named_by_its_time_is_told_its_name(
    train, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_in(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = train(*ASKED)
    (sweep,) = Path("logs/runs").iterdir()
    assert done.err.splitlines()[-2].endswith(f" sweep_name={sweep.name}")


def _wait_for(what, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_launchers_jobs_are_stopped_too(tiny: list[str], tmp_path: Path) -> None:
    """They are processes of their own, and would train on."""
    asked = [
        *tiny, "-m", "seed=1,2,3", "max_steps=100000", "sweep_name=mine",
        "hydra/launcher=parallel", "checkpoint.every_seconds=null",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *asked],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def started() -> int:
        logs = (tmp_path / SWEEP).glob("*/train.log")
        return sum("the clock starts" in path.read_text() for path in logs)

    _wait_for(lambda: started() == 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "go on with: python train.py" in err
    folders = run_folders(tmp_path / SWEEP)
    assert len(folders) == 2
    for folder in folders:
        assert "stopped after step" in (folder / "train.log").read_text()
        assert (folder / "checkpoint.ckpt").is_file()
