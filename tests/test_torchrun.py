"""Two ranks over gloo on loopback: one folder, one voice, the score of one process."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import GOLF, ROOT, result_of

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun_command(*arguments: str, ranks: int = 2, script: str = "train.py") -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={ranks}", str(ROOT / script), *arguments]  # fmt: skip


def torchrun(
    *arguments: str, cwd: Path, ranks: int = 2, script: str = "train.py"
) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(*arguments, ranks=ranks, script=script)
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300
    )


@pytest.mark.slow
def test_two_ranks_train_one_run(tiny: list[str], tmp_path: Path, program, cache_dir: Path) -> None:
    done = torchrun(*tiny, "qat=int6", "qat.start_step=5", "run_name=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "logs/runs").iterdir()] == ["two"]
    assert done.stderr.count("QAT on since step 6 (") == 1
    assert done.stdout.count("QAT against its no-QAT baseline") == 1
    folder = tmp_path / "logs/runs/two"
    result = result_of(folder)
    assert (result["qat_first_step"], result["qat_steps"], result["steps"]) == (6, 7, 12)
    assert result["on_grid_share"] == 1.0
    assert abs(result["val_bpb_snapped"] - result["val_bpb_artifact"]) < 1e-9
    scored = program(
        "eval.py", f"artifact={folder}/artifact.qat", f"data.cache_dir={cache_dir}",
        "eval.batch_tokens=2048",
    )  # fmt: skip
    match = re.search(r"^val_bpb\s+(\S+)$", scored.out, re.MULTILINE)
    assert match, scored.err
    assert float(match[1]) == pytest.approx(result["val_bpb_artifact"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    [["qat=none"], ["qat=int6"], ["qat=lsq4"], ["qat=int6", "qat.gradient=noise"]],
    ids=" ".join,
)
def test_two_ranks_follow_the_one_rank_curve(
    arm: list[str], tiny: list[str], tmp_path: Path, train
) -> None:
    """The same global batch, the same snapped weights (and noise) on every rank."""
    asked = [
        *arm,
        "qat.start_step=0",
        "logger.every_steps=1",
        "optimizer.newton_schulz_dtype=fp32",
    ]  # in bf16 a last bit grows, on some processors
    done = torchrun(*tiny, *asked, "run_name=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert train(*asked, "run_name=one").code == 0

    def losses(name: str) -> list[float]:
        lines = (tmp_path / f"logs/runs/{name}/metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("train_loss")
        return [float(line.split(",")[column]) for line in lines[1:]]

    one, two = losses("one"), losses("two")
    print([f"{abs(a - b):.1e}" for a, b in zip(one, two, strict=True)])
    assert one[:1] == pytest.approx(two[:1], abs=1e-6)  # the same snapped weights
    assert one[:3] == pytest.approx(two[:3], abs=1e-4)  # the same updates
    assert one == pytest.approx(two, abs=1e-2)  # a code that flips by rounding is a step off
    if arm != ["qat=none"]:
        rows = [result_of(tmp_path / f"logs/runs/{name}") for name in ("one", "two")]
        assert [row["qat_steps"] for row in rows] == [12, 12]
        assert rows[0]["on_grid_share"] == pytest.approx(rows[1]["on_grid_share"], abs=1e-3)


@pytest.mark.slow
def test_two_ranks_go_on_with_a_run_that_died_in_its_export(
    tiny: list[str], tmp_path: Path
) -> None:
    done = torchrun(*tiny, "qat=int6", "run_name=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logs/runs/two"
    before, result = (folder / "artifact.qat").read_bytes(), result_of(folder)
    for name in ("artifact.qat", "result.json"):
        (folder / name).unlink()
    done = torchrun("resume=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "artifact.qat").read_bytes() == before
    assert result_of(folder)["val_bpb_artifact"] == result["val_bpb_artifact"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds rank 0 in /proc")
def test_two_ranks_are_preempted_together(tiny: list[str], tmp_path: Path) -> None:
    """SIGTERM to rank 0 alone: all ranks stop after the same step, and go on from it."""
    asked = [*tiny, "qat=int6", "max_steps=4000", "schedule.warmdown_steps=40",
             "checkpoint.every_seconds=null", "logger.every_steps=1", "run_name=two"]  # fmt: skip
    process = subprocess.Popen(
        torchrun_command(*asked), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "logs/runs/two/metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process_of_rank(0, process.pid), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "go on with: python train.py resume=logs/runs/two" in err
    assert "PreemptedError" not in err  # no traceback of ours beside the launcher's
    state = torch.load(tmp_path / "logs/runs/two/checkpoint.ckpt", weights_only=True)
    assert state["progress"]["step"] >= 5


def process_of_rank(rank: int, launcher: int) -> int:
    """Process id of a rank among the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(children)


@pytest.mark.slow
def test_one_two_and_four_ranks_at_the_same_global_batch(tmp_path: Path) -> None:
    """In float32 throughout: the same losses on any number of ranks."""
    asked = [
        "profile=laptop", f"data.train_files={GOLF}/fineweb_train_*.bin",
        f"data.val_files={GOLF}/fineweb_val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model",
        "model.num_layers=3", "model.dim=192", "model.num_heads=3", "model.num_kv_heads=1",
        "model.mlp_mult=3", "model.vocab_size=512", "model.tie_embeddings=false", "seq_len=128",
        "batch_tokens=1024", "precision=fp32", "optimizer.newton_schulz_dtype=fp32",
        "budget_seconds=null", "max_steps=60", "schedule.warmdown_steps=30",
        "schedule.warmup_steps=0", "eval.max_tokens=1024",
    ]  # fmt: skip
    losses = {}
    for ranks in (1, 2, 4):
        done = torchrun(*asked, f"run_name=ranks{ranks}", cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        with open(tmp_path / f"logs/runs/ranks{ranks}/metrics.csv", encoding="utf-8") as file:
            losses[ranks] = [float(row["train_loss"]) for row in csv.DictReader(file)]
    for ranks in (2, 4):
        off = [abs(a - b) for a, b in zip(losses[1], losses[ranks], strict=True)]
        print(f"{ranks} ranks: off by {max(off[:20]):.1e} over 20 steps, {max(off):.1e} over 60")
        assert max(off[:20]) < 1e-5
        assert max(off) < 1e-4


@pytest.mark.slow
def test_a_mistake_is_said_once_though_rank_0_is_late(tiny: list[str], tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, sys, time\n"
        "time.sleep(int(os.environ['RANK'] == '0'))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    command = torchrun_command(*tiny, "batch_tokens=32")
    command[command.index(str(ROOT / "train.py"))] = str(late)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.count("error: batch_tokens = 32") == 1
    assert not (tmp_path / "logs").exists()
