"""Whatever ends a run, it goes on from its checkpoint and ends in the same bits."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import yaml

from qat.errors import UserError
from qat.quantize import gradients
from qat.runs import provenance, run_folder
from qat.runs.identity import KEY, CheckpointIdentity, check_resumed, check_same
from qat.settings.command_line import main
from qat.text.shards import ShardWriter
from qat.training.checkpoint import load_checkpoint
from qat.training.loop import TrainingLoop
from tests.conftest import ROOT, code_in, result_of
from train import PROGRAM

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


@pytest.mark.slow
def test_a_run_that_moved_names_all_that_made_it(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_in(monkeypatch, 4)
    crashed(train, "checkpoint.every_steps=2", "run_name=r")
    first = json.loads((RUNS / "r" / "provenance.json").read_text())
    monkeypatch.setattr(provenance, "commit", lambda: "b-dirty")
    monkeypatch.setattr(provenance, "hardware", lambda ranks: "an abacus")
    assert program("train.py", "resume=r").code == 0
    row = result_of(RUNS / "r")
    assert row["commit"] == f"{first['commit']}, then b-dirty"
    assert row["hardware"] == f"{first['hardware']}, then an abacus"


def test_a_run_that_stays_where_it_was_names_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = provenance.commit(), provenance.hardware(1)
    run_folder.describe(tmp_path, "", [], {}, 1)
    for _ in range(2):
        assert run_folder.note_resumption(tmp_path, 1) == here
    monkeypatch.setattr(provenance, "commit", lambda: "b")
    for _ in range(2):
        assert run_folder.note_resumption(tmp_path, 1) == (f"{here[0]}, then b", here[1])
    (tmp_path / "provenance.json").write_text("[]")
    assert run_folder.note_resumption(tmp_path, 1) == ("b", here[1])


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
        *(
            pytest.param(arm, step, marks=pytest.mark.slow)
            for arm, step in (
                *(("int6", step) for step in (2, 4, 13, 19)),
                *(
                    (arm, 13)
                    for arm in ("none", "lsq4", "noise", "lsq4 stopped", "soft_round", "ramp")
                ),
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


@pytest.mark.slow
def test_the_gradient_rule_of_the_docs_is_one_file_and_its_state_survives(
    train, program, plug_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(gradients, gradients.rule_kinds, "hold", code_in("add_a_gradient.md")[0])
    asked = [*LONG, "qat=int4", "qat.start_step=3", "checkpoint.every_steps=4"]
    assert train(*asked, "run_name=identity").code == 0
    asked.append("qat.gradient=hold")
    assert train(*asked, "run_name=whole").code == 0
    crash_in(monkeypatch, 13)
    crashed(train, *asked, "run_name=torn")
    assert program("train.py", "resume=torn").code == 0
    same("whole", "torn")
    losses = {n: result_of(RUNS / n)["train_loss"] for n in ("identity", "whole")}
    assert losses["identity"] != losses["whole"]


@pytest.mark.slow
def test_a_run_that_begins_elsewhere_in_its_text_goes_on_there(
    train, program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*LONG, "run_name=plain").code == 0
    assert train(*LONG, "data_seed=5", "run_name=whole").code == 0
    crash_in(monkeypatch, 7)
    crashed(train, *LONG, "data_seed=5", "run_name=torn")
    assert program("train.py", f"resume={RUNS / 'torn'}").code == 0
    same("whole", "torn")
    losses = {name: result_of(RUNS / name)["val_loss_float"] for name in ("plain", "whole")}
    assert losses["plain"] != losses["whole"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_clock_goes_on(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time lost or charged twice beyond the last checkpoint."""
    clock = ["max_steps=null", "budget_seconds=2", "checkpoint.every_seconds=0.1"]
    crash_in(monkeypatch, 15)
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


@pytest.mark.slow
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


def _edited(config: str, setting: str, value: str) -> str:
    """config.yaml with another value of a setting, named as typed."""
    settings = yaml.safe_load(config)
    group, name = settings, setting.split(".")
    for part in name[:-1]:
        group = group[part]
    group[name[-1]] = yaml.safe_load(value)
    return yaml.safe_dump(settings, sort_keys=False)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_text_and_settings_only(
    train, program, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = corpus.read_text()[:50_000]
    (tmp_path / "a.txt").write_text(text)
    crash_in(monkeypatch, 5)
    named = ["data.files=[*.txt]", "data.cache_dir=cache", "max_steps=8", "qat=int6"]
    crashed(train, *named, "checkpoint.every_steps=4", "run_name=torn")
    config = RUNS / "torn" / "config.yaml"
    own = config.read_text()

    def refused(change: str) -> None:
        before = {path: path.read_bytes() for path in (RUNS / "torn").iterdir()}
        done = program("train.py", "resume=torn")
        error = done.err.splitlines()[-1]
        assert done.code == 2
        assert error.startswith("error: resume=logs/runs/torn: its checkpoint was made of")
        assert change in error
        assert {path: path.read_bytes() for path in (RUNS / "torn").iterdir()} == before

    (tmp_path / "a.txt").write_text(text + "One more line.\n")
    refused(f"{tmp_path / 'a.txt'} has other content: undo that")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("A file that the glob matches too.\n")
    refused(f"{tmp_path / 'b.txt'} is new: undo that")
    (tmp_path / "b.txt").unlink()
    for setting, value, said in (
        ("seed", "7", "seed was 1337 and is 7"),
        ("grid.bits", "4", "grid.bits was 6 and is 4"),
        ("plan.rules", "{'*': grid, 'blocks.*': fp32}", "plan.rules was "),
    ):
        config.write_text(_edited(own, setting, value))
        refused(said)
    for setting, value in (("data.cache_dir", "moved"), ("logger.tags", "[a]")):
        config.write_text(own := _edited(own, setting, value))
    (tmp_path / "cache").rename(tmp_path / "moved")
    (RUNS / "torn").rename(tmp_path / "elsewhere")
    (tmp_path / "a.txt").rename(tmp_path / "renamed.txt")
    done = program("train.py", "resume=elsewhere")
    assert done.code == 0, done.err
    assert "going on after step 4" in done.err


@pytest.mark.slow
def test_shards_and_tokenizer_of_a_run_that_goes_on(
    train, program, prepared_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(prepared_text, tmp_path / "data")
    tokens = np.fromfile(data / "train_000000.bin", "<u2")[512:]
    crash_in(monkeypatch, 5)
    named = ["data.files=null", "data.train_files=data/train_*.bin", "data.val_files=data/val_*",
             "data.tokenizer=data/tokenizer.model", "checkpoint.every_steps=4"]  # fmt: skip
    crashed(train, *named, "run_name=torn")

    def refused(change: str) -> None:
        done = program("train.py", "resume=torn")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert change in done.err

    shard = data / "train_000000.bin"
    own = shard.read_bytes()
    raw = bytearray(own)
    raw[1024 + 2 * (len(tokens) // 2)] ^= 1  # of a token in the middle
    shard.write_bytes(raw)
    refused(f"{shard} has other content")
    shard.write_bytes(own)
    writer = ShardWriter(tmp_path, "more")
    writer.write(tokens[:100])
    writer.close()
    (tmp_path / "more_000000.bin").rename(data / "train_000001.bin")
    refused(f"{data / 'train_000001.bin'} is new")
    (data / "train_000001.bin").unlink()
    (data / "notes.json").unlink()  # which says what tokenizer made them
    model = (data / "tokenizer.model").read_bytes()
    (data / "tokenizer.model").write_bytes(model + b"\x1a\x02\x18\x00")  # puts no space in front
    refused(f"{data / 'tokenizer.model'} has other content")


def test_what_is_made_of_a_checkpoint_keeps_to_its_text(
    program, finished: Path, corpus: Path, tmp_path: Path
) -> None:
    """Stored again, or scored, on other text than the run's own: refused in one line."""
    run = shutil.copytree(finished, tmp_path / "copy")
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().replace("sky", "hill"))
    for name in ("config.yaml", "result.json"):
        text = (run / name).read_text()
        assert str(corpus) in text
        (run / name).write_text(text.replace(str(corpus), str(other)))
    for asked, said in (
        (["task=fill", "run=copy", "limit_bytes=900000"], "run=copy: its checkpoint was made of"),
        (["task=cabinet", "run=copy"], "run=copy: its checkpoint was made of something else: "),
        (["eval=full", "artifact=copy/checkpoint.ckpt"], "something else: data.files was "),
        (
            ["eval=full", "artifact=copy/checkpoint.ckpt", f"data.files=[{other}]"],
            "not the tokenizer this artifact was trained with",
        ),
    ):
        done = program("eval.py", *asked)
        assert done.code == 2, done.err
        assert said in done.err.splitlines()[-1]


def test_what_was_made_of_something_else_is_named() -> None:
    held = CheckpointIdentity(
        {"seed": 1, "data.files": "a"}, {"train": "1", "val": "2"}, {"a": "x"}
    )
    assert held.changes(replace(held, files={"b": "x"})) == []  # moved
    assert held.changes(replace(held, settings=held.settings | {"data.files": "b"})) == []
    other = replace(held, settings=held.settings | {"seed": 2, "grid.bits": 4})
    assert held.changes(other, apart_from=["grid"]) == ["seed was 1 and is 2"]
    assert held.changes(other, ["seed", "grid"]) == []
    other = replace(held, data={"val": "3"})
    assert held.changes(other) == ["the validation text is another"]
    other = replace(
        other,
        data={"train": "1", "val": "3"},
        files={"b": "y"},
        settings=held.settings | {"data.files": "b"},
    )
    assert held.changes(other) == ["a is gone", "b is new", "data.files was a and is b"]
    other = replace(held, settings=held.settings | {"data.val_fraction": 0.1})
    assert held.changes(other) == ["data.val_fraction was None and is 0.1"]
    with pytest.raises(UserError, match="resume=r: an earlier version wrote its checkpoint"):
        check_resumed("resume=r", CheckpointIdentity.held_by({"weights": {}}), held)
    check_same("run=r", None, held)
    with pytest.raises(UserError, match="of something else: the validation text is another: "):
        check_same(
            "run=r", CheckpointIdentity.held_by({KEY: vars(held)}), replace(held, data={"val": "3"})
        )


@pytest.mark.slow
def test_two_processes_never_share_a_run(train, program, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_in(monkeypatch, 5)
    crashed(train, "run_name=r")
    with filelock.FileLock(RUNS / "r" / ".lock"):
        done = program("train.py", "resume=r")
    assert done.code == 2
    assert "another process is at work on this run" in done.err
    assert program("train.py", "resume=r").code == 0


def _main(cwd: Path, arguments: list[str]) -> None:
    """train.py as another process runs it."""
    os.chdir(cwd)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    sys.argv = [str(ROOT / "train.py"), *arguments]
    sys.exit(main(PROGRAM))


def _kill(process: BaseProcess, cwd: Path, checkpoints: int, pause_seconds: float) -> None:
    """kill -9 a little after the process has written so many checkpoints.

    Counting what it wrote, not the time, keeps the run from ending before the last kill however
    fast the machine is.
    """
    checkpoint = cwd / RUNS / "torn" / "checkpoint.ckpt"

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    last = written()
    process.start()
    while checkpoints and process.is_alive():
        if (now := written()) != last:
            last, checkpoints = now, checkpoints - 1
        time.sleep(0.0005)
    time.sleep(pause_seconds)
    assert process.is_alive(), "it ended before it was killed"
    process.kill()
    process.join()
    process.close()


@pytest.mark.slow
def test_twenty_kills(tiny: list[str], tmp_path: Path, train) -> None:
    """Real processes, killed wherever they are: starting, training, saving (export: above)."""
    asked = [*tiny, "qat=int6", "max_steps=800", "schedule.warmdown_steps=160",
             "qat.start_step=250", "checkpoint.every_steps=7"]  # fmt: skip
    resume, arguments = ["resume=torn"], [*asked, "run_name=torn"]
    chooser = random.Random(5)
    # Processes that are as good as new, and need not import torch again.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.runs.test_resume", "lightning.pytorch", "hydra.main"])
    for kill in range(20):
        process = processes.Process(target=_main, args=(tmp_path, arguments))
        if kill % 5 == 0:  # on its way to the first step
            _kill(process, tmp_path, checkpoints=0, pause_seconds=chooser.uniform(0.1, 1.5))
        else:
            _kill(process, tmp_path, chooser.randint(1, 5), chooser.uniform(0.0, 0.1))
        if (tmp_path / RUNS / "torn").is_dir():
            arguments = resume
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert train(*asked[len(tiny) :], "run_name=whole").code == 0
    same("whole", "torn")


def test_the_state_of_another_version_is_one_line(train, program, monkeypatch) -> None:
    assert train("qat=none", "run_name=r", "max_steps=2").code == 0
    (RUNS / "r" / "result.json").unlink()

    def load_state(*_) -> None:
        raise KeyError("offset w")

    monkeypatch.setattr(TrainingLoop, "load_state", load_state)
    done = program("train.py", "resume=r")
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert "the checkpoint is of another version of this program ('offset w')" in done.err


def test_choices_that_were_edited_are_refused(train, program) -> None:
    """They say which row of a table a run is."""
    assert train("qat=none", "run_name=r", "max_steps=2").code == 0
    (RUNS / "r" / "result.json").unlink()
    file = RUNS / "r" / "choices.json"
    file.write_text(file.read_text().replace('"qat": "none"', '"qat": "int6"'))
    done = program("train.py", "resume=r")
    assert done.code == 2
    assert "resume=logs/runs/r: its choices.json was changed; bring that back" in done.err
