"""``launch/slurm.sbatch``, with stand-ins for SLURM's own commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def started(tmp_path: Path):
    """started(job id, *arguments): the words that srun is given."""
    for name, line in {"scontrol": "echo node-a", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def start(job: int, *arguments: str) -> list[str]:
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_SUBMIT_DIR": str(tmp_path), "HOME": str(tmp_path),
                 "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}  # fmt: skip
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "launch/slurm.sbatch", *arguments], capture_output=True, check=True,
            encoding="utf-8", env=os.environ | slurm | {"PATH": path},
        )  # fmt: skip
        return done.stdout.splitlines()

    return start


def test_each_job_has_a_port_of_its_own(started) -> None:
    ports = {
        word.rpartition(":")[2]
        for job in (1234, 1235)
        for word in started(job, "r")
        if word.startswith("--rdzv_endpoint=node-a:")
    }
    assert len(ports) == 2
    assert all(1024 < int(port) < 32768 for port in ports), "above are ports that systems give out"


@pytest.mark.parametrize("runs", [None, "my runs", "~/runs"])
def test_a_requeued_job_goes_on(runs: str | None, started, tmp_path: Path) -> None:
    asked = ("r", "qat=int6", *([f"runs_dir={runs}"] if runs else ()))
    assert started(1, *asked)[-len(asked) :] == ["run_name=r", *asked[1:]]
    folder = tmp_path / (runs or "logs/runs").removeprefix("~/")
    (folder / "r").mkdir(parents=True)
    resumed = started(1, *asked)[-2:]
    assert resumed[0] == "resume=r"
    assert tmp_path / resumed[1].removeprefix("runs_dir=") == folder
