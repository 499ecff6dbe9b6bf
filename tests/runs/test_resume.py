"""Whatever ends a run, it goes on from its checkpoint and ends in the same bits."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

from qat.quantize import gradients
from qat.training.checkpoint import load_checkpoint
from qat.training.loop import TrainingLoop
from tests.conftest import ROOT, code_in, result_of

RUNS = Path("logs/runs")
LONG = ["max_steps=20", "schedule.warmdown_steps=8", "logger.every_steps=3"]
ARMS = {
    "none": [],
    "int6": ["qat=int6", "qat.start_step=7"],
    "lsq4": ["qat=lsq4", "qat.start_step=5"],
    "lsq4 stopped": ["qat=lsq4", "qat.start_step=3", "qat.stop_step=9"],
    "noise": ["qat=int4", "qat.gradient=noise", "qat.start_fraction=0.4"],
    "soft_round": ["qat=int4", "qat.gradient=soft_round", "qat.start_lr_scale=0.9"],
    "ramp": ["qat=int5", "qat.start_step=6", "qat.ramp_steps=7"],
}


class Crash(BaseException):
    """Nothing in the program catches this: the nearest thing to kill -9 within one process."""


def crash_in(monkeypatch: pytest.MonkeyPatch, step: int, what=None) -> None:
    """The update after ``step`` finished ones never ends (the first time)."""
    update = TrainingLoop._update
    done = []

    def dies(self: TrainingLoop) -> None:
        if not self.is_priming and self.progress.step == step and not done:
            done.append(step)
            if what is None:
                raise Crash
            what()
        update(self)

    monkeypatch.setattr(TrainingLoop, "_update", dies)


def crashed(train, *overrides: str) -> None:
    with pytest.raises(Crash):
        train(*overrides)


def same(a: str, b: str) -> None:
    """Two runs: the same file, the same losses, the same story."""
    one, two = RUNS / a, RUNS / b
    assert (one / "artifact.qat").read_bytes() == (two / "artifact.qat").read_bytes()
    lines = [
        [",".join(line.split(",")[:2] + line.split(",")[3:]) for line in text.splitlines()]
        for text in ((one / "metrics.csv").read_text(), (two / "metrics.csv").read_text())
    ]  # without elapsed_seconds
    assert lines[0] == lines[1]
    rows = [result_of(folder) for folder in (one, two)]
    for key in ("status", "qat", "steps", "tokens", "train_loss", "val_bpb_artifact",
                "qat_first_step", "qat_last_step", "qat_steps", "on_grid_share",
                "nonzero_gradient_share", "movable_share"):  # fmt: skip
        assert rows[0][key] == rows[1][key], key


@pytest.mark.parametrize(
    ("arm", "step"),
    [
        ("int6", 7),
        *((arm, 13) for arm in ("none", "lsq4")),
        *(
            pytest.param(arm, step, marks=pytest.mark.slow)
            for arm, step in (
                *(("int6", step) for step in (2, 4, 13, 19)),
                *((arm, 13) for arm in ("noise", "lsq4 stopped", "soft_round", "ramp")),
            )
        ),
    ],
)
def test_resumed_runs_end_in_the_same_bits(
    arm: str, step: int, train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*LONG, *ARMS[arm], "checkpoint.every_steps=4"]
    assert train(*asked, "run_name=whole").code == 0
    crash_in(monkeypatch, step)
    crashed(train, *asked, "run_name=torn")
    done = program("train.py", "resume=torn")
    assert done.code == 0, done.err
    last = step // 4 * 4
    assert (f"going on after step {last}" in done.err) == (last > 0)
    same("whole", "torn")


def test_the_gradient_rule_of_the_docs_is_one_file_and_its_state_survives(
    train, program, plug_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(gradients, gradients.rule_kinds, "freeze", code_in("add_a_gradient.md")[0])
    asked = [*LONG, "qat=int4", "qat.start_step=3", "checkpoint.every_steps=4"]
    assert train(*asked, "run_name=identity").code == 0
    asked.append("qat.gradient=freeze")
    assert train(*asked, "run_name=whole").code == 0
    crash_in(monkeypatch, 13)
    crashed(train, *asked, "run_name=torn")
    assert program("train.py", "resume=torn").code == 0
    same("whole", "torn")
    losses = {n: result_of(RUNS / n)["train_loss"] for n in ("identity", "whole")}
    assert losses["identity"] != losses["whole"]


def test_a_run_that_died_in_its_export_does_not_train_again(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*LONG, "qat=lsq4", "qat.start_step=5"]
    assert train(*asked, "run_name=whole").code == 0

    def dies(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr("qat.runs.storing.write_whole", dies)
        crashed(train, *asked, "run_name=torn")
    crash_in(monkeypatch, 20)  # no update may follow the last
    assert program("train.py", f"resume={RUNS / 'torn'}").code == 0
    same("whole", "torn")


def test_a_full_disk_keeps_the_last_checkpoint(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*LONG, "qat=int6", "checkpoint.every_steps=3"]
    assert train(*asked, "run_name=whole").code == 0
    sync, calls = os.fsync, []

    def full(fd: int) -> None:
        if "checkpoint" in os.readlink(f"/proc/self/fd/{fd}"):
            calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        done = train(*asked, "run_name=torn")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert not list((RUNS / "torn").glob(".*.tmp"))
    (RUNS / "torn" / ".checkpoint.ckpt.1.tmp").write_bytes(b"of one that was killed")
    done = program("train.py", "resume=torn")
    assert "going on after step 6" in done.err
    assert not list((RUNS / "torn").glob(".*.tmp"))
    same("whole", "torn")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*LONG, "qat=int6", "checkpoint.every_steps=3", "logger.every_steps=1"]
    assert train(*asked, "run_name=whole").code == 0
    with monkeypatch.context() as patched:
        _poison(patched, step=8)
        done = train(*asked, "run_name=torn")
    assert done.code == 1
    assert "train loss is nan at step 9; try lower learning rates" in done.err
    row = result_of(RUNS / "torn")
    assert (row["status"], row["exit_code"]) == ("failed", 1)
    assert "step 9" in row["error"]
    assert "going on after step 6" in program("train.py", "resume=torn").err
    same("whole", "torn")


def test_weights_that_are_not_finite_are_never_saved(
    train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update may break them while its own loss is still fine."""
    _poison(monkeypatch, step=9)
    done = train(*LONG, "checkpoint.every_steps=3", "run_name=torn")
    assert done.code == 1
    assert "is not finite after step 9" in done.err
    state = load_checkpoint(RUNS / "torn" / "checkpoint.ckpt")
    assert state is not None
    assert state["progress"]["step"] == 6


def _poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The update number ``step`` leaves one weight that is not a number."""
    update = TrainingLoop._update

    def poisoned(self: TrainingLoop) -> None:
        if not self.is_priming and self.progress.step == step - 1:
            with torch.no_grad():
                for optimizer in self.trainer.optimizers:
                    for p in optimizer.param_groups[0]["params"]:
                        p.grad[0] = float("nan")
        update(self)

    monkeypatch.setattr(TrainingLoop, "_update", poisoned)


def test_a_run_folder_that_goes_away(train, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_in(monkeypatch, 5, lambda: shutil.rmtree(RUNS / "gone"))
    done = train(*LONG, "checkpoint.every_steps=3", "run_name=gone")
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.err
    assert "cannot write logs/runs/gone/metrics.csv: No such file or directory" in errors[0]


@pytest.mark.parametrize(
    "damage",
    [None, *(pytest.param(d, marks=pytest.mark.slow) for d in (b"", b"not a checkpoint"))],
)
def test_without_a_usable_checkpoint_it_starts_again(
    damage: bytes | None, train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*LONG, "run_name=whole").code == 0
    crash_in(monkeypatch, 11)
    crashed(train, *LONG, "checkpoint.every_steps=5", "run_name=torn")
    checkpoint = RUNS / "torn" / "checkpoint.ckpt"
    if damage is None:
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(damage)
    done = program("train.py", "resume=torn")
    assert done.code == 0, done.err
    assert ("is damaged" in done.err) == (damage is not None)
    same("whole", "torn")


def test_sigterm_saves_and_says_how_to_go_on(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*LONG, "qat=int6", "run_name=whole").code == 0
    before = signal.getsignal(signal.SIGTERM)
    crash_in(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = train(*LONG, "qat=int6", "run_name=torn")
    assert done.code == 143
    assert "stopped after step 10; go on with: python train.py resume=logs/runs/torn" in done.err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (RUNS / "torn" / "result.json").exists()
    assert program("train.py", "resume=torn").code == 0
    same("whole", "torn")


def test_an_interrupted_run_goes_on(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert train(*LONG, "run_name=whole").code == 0
    crash_in(monkeypatch, 9, interrupt)
    assert train(*LONG, "checkpoint.every_steps=4", "run_name=torn").code == 130
    assert result_of(RUNS / "torn")["status"] == "failed"
    assert program("train.py", "resume=torn").code == 0
    same("whole", "torn")


def test_the_clock_goes_on(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time lost or charged twice beyond the last checkpoint."""
    clock = ["max_steps=null", "budget_seconds=2", "checkpoint.every_seconds=0.4"]
    crash_in(monkeypatch, 40)
    crashed(train, *clock, "run_name=torn", "logger.every_steps=1")
    time.sleep(1.0)  # being dead costs nothing
    assert program("train.py", "resume=torn").code == 0
    result = result_of(RUNS / "torn")
    lines = (RUNS / "torn" / "metrics.csv").read_text().splitlines()[1:]
    times = [float(line.split(",")[2]) for line in lines]
    assert times == sorted(times)
    assert times[-2] < 2.0 <= times[-1]
    assert result["overshoot_seconds"] == result["train_seconds"] - 2.0 >= 0.0
    assert [int(line.split(",")[0]) for line in lines] == list(range(1, result["steps"] + 1))


def test_a_finished_run_says_so(train, program) -> None:
    assert train("run_name=r").code == 0
    before = {p: p.read_bytes() for p in (RUNS / "r").iterdir() if p.is_file()}
    done = program("train.py", "resume=r")
    assert done.code == 0
    assert "logs/runs/r is finished" in done.out
    assert {p: p.read_bytes() for p in before} == before


def test_resume_mistakes(train, program, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert train("run_name=r", "max_steps=2").code == 0
    for arguments, message in (
        (["resume=nobody"], "resume=nobody: no such folder"),
        (["resume=empty"], "resume=empty: not the folder of a run"),
        (["resume=r", "seed=3"], "resume=logs/runs/r: takes everything from that run; drop seed=3"),
        (["resume=r", "profile=golf"], "drop profile=golf"),
    ):
        done = program("train.py", *arguments)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert message in done.err
    (RUNS / "r" / "config.yaml").write_text("seeed: 1\n")
    assert "saved by another version" in program("train.py", "resume=r").err


def test_two_processes_never_share_a_run(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_in(monkeypatch, 5)
    crashed(train, "run_name=r")
    with filelock.FileLock(RUNS / "r" / ".lock"):
        done = program("train.py", "resume=r")
    assert done.code == 2
    assert "another process is at work on this run" in done.err
    assert program("train.py", "resume=r").code == 0


def _kill(command: list[str], cwd: Path, checkpoints: int, pause_seconds: float) -> None:
    """kill -9 a little after the process has written so many checkpoints.

    Counting what it wrote, not the time, keeps the run from ending before the last kill however
    fast the machine is.
    """
    checkpoint = cwd / RUNS / "torn" / "checkpoint.ckpt"

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    with subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL) as process:
        last = written()
        while checkpoints and process.poll() is None:
            if (now := written()) != last:
                last, checkpoints = now, checkpoints - 1
            time.sleep(0.0005)
        time.sleep(pause_seconds)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()


@pytest.mark.slow
def test_twenty_kills(tiny: list[str], tmp_path: Path, train) -> None:
    """Real processes, killed wherever they are: starting, training, saving (export: above)."""
    asked = [*tiny, "qat=int6", "max_steps=1500", "schedule.warmdown_steps=300",
             "qat.start_step=500", "checkpoint.every_steps=7"]  # fmt: skip
    start = [sys.executable, str(ROOT / "train.py")]
    resume, command = [*start, "resume=torn"], [*start, *asked, "run_name=torn"]
    chooser = random.Random(5)
    for kill in range(20):
        if kill % 5 == 0:  # on its way to the first step
            _kill(command, tmp_path, checkpoints=0, pause_seconds=chooser.uniform(0.1, 1.5))
        else:
            _kill(command, tmp_path, chooser.randint(1, 9), chooser.uniform(0.0, 0.1))
        if (tmp_path / RUNS / "torn").is_dir():
            command = resume
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert train(*asked[len(tiny) :], "run_name=whole").code == 0
    same("whole", "torn")
