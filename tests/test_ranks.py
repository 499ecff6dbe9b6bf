"""Ranks that are slow, that die, and that sit on two nodes (gloo on loopback)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Done, result_of
from tests.test_torchrun import ENVIRONMENT, process_of_rank, torchrun, torchrun_command

# train.py with a rank 1 whose steps take longer and whose clock runs at double speed; at the end
# every rank writes down what it holds.
SLOW_RANK = """
import hashlib, json, os, sys, time
sys.path.insert(0, ROOT)
rank, right = int(os.environ["RANK"]), time.perf_counter
if rank == 1:
    time.perf_counter = lambda: 2 * right()
import train
from qat.settings.command_line import main
from qat.training.loop import TrainingLoop

update, finish = TrainingLoop._update, TrainingLoop._finish_training

def slow(self):
    time.sleep(0.03 * rank)
    update(self)

def tell(self):
    finish(self)
    weights = b"".join(p.detach().numpy().tobytes() for p in self.masters.values())
    steps = b"".join(s.detach().numpy().tobytes() for s in self.switch.learned_scales.values())
    told = [hashlib.sha256(weights + steps).hexdigest(), vars(self.progress)]
    with open(f"rank{rank}.json", "w") as file:
        json.dump(told, file)

TrainingLoop._update, TrainingLoop._finish_training = slow, tell
sys.exit(main(train.PROGRAM))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["int6", "lsq4"])
def test_a_slow_rank_with_a_wrong_clock_ends_with_the_same_weights(
    arm: str, tiny: list[str], tmp_path: Path
) -> None:
    """Rate, switch, ramp and stop come from rank 0's clock alone."""
    (tmp_path / "slow.py").write_text(f"ROOT = {str(ROOT)!r}\n" + SLOW_RANK)
    asked = [
        *tiny, "max_steps=null", "budget_seconds=4", "schedule.warmdown_steps=40", f"qat={arm}",
        "qat.start_fraction=0.4", "qat.ramp_steps=7", "averaging=ema", "run_name=slow",
    ]  # fmt: skip
    command = [a.replace(str(ROOT / "train.py"), "slow.py") for a in torchrun_command(*asked)]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0][0] == told[1][0]
    for key in ("step", "elapsed_seconds", "qat_first_step", "qat_last_step", "qat_steps"):
        assert told[0][1][key] == told[1][1][key], key
    row = result_of(tmp_path / "logs/runs/slow")
    times = [
        float(line.split(",")[2])
        for line in (tmp_path / "logs/runs/slow/metrics.csv").read_text().splitlines()[1:]
    ]
    assert times[-2] < 4.0 <= times[-1] <= row["train_seconds"]  # at most one step over
    first = row["qat_first_step"]
    assert times[first - 3] < 0.4 * 4.0 <= times[first - 2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank in /proc")
def test_a_dying_rank_ends_all_and_the_run_goes_on(tiny: list[str], tmp_path: Path) -> None:
    asked = [*tiny, "qat=int6", "max_steps=300", "schedule.warmdown_steps=40",
             "checkpoint.every_steps=20", "run_name=torn"]  # fmt: skip
    process = subprocess.Popen(
        torchrun_command(*asked), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "logs/runs/torn"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
    died = time.monotonic()
    _, err = process.communicate(timeout=60)
    print(f"all ended {time.monotonic() - died:.1f} s after rank 1")
    assert process.returncode != 0
    assert "rank      : 1" in err  # torchrun's summary of what failed first
    assert "SIGKILL" in err
    assert not (folder / "artifact.qat").exists()
    done = torchrun("resume=torn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    assert result_of(folder)["status"] == "finished"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_two_nodes_train_one_run(
    ranks_per_node: int, tiny: list[str], tmp_path: Path, train: Callable[..., Done]
) -> None:
    """Two launchers, as SLURM starts one on each node; the curve is that of one node."""
    asked = ["qat=int6", "qat.start_step=11", "optimizer.newton_schulz_dtype=fp32"]
    port = _free_port()
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                f"--nproc_per_node={ranks_per_node}", "--master_addr=127.0.0.1",
                f"--master_port={port}", str(ROOT / "train.py"), *tiny, *asked, "run_name=nodes",
            ],
            cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "QAT on since step 12" in errors[0]
    assert "QAT on since" not in errors[1]
    done = train(*asked, "run_name=one")
    assert done.code == 0, done.err
    folders = [tmp_path / "logs/runs" / name for name in ("nodes", "one")]
    assert [result_of(folder)["qat_steps"] for folder in folders] == [1, 1]
    curves = [
        [float(line.split(",")[1]) for line in (f / "metrics.csv").read_text().splitlines()[1:]]
        for f in folders
    ]
    assert curves[0][:11] == pytest.approx(curves[1][:11], abs=1e-5)
    saved = json.loads((folders[0] / "provenance.json").read_text())
    assert str(2 * ranks_per_node) in json.dumps(saved)
