"""Every command of the README composes and passes the checks, on both profiles."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

import train
from qat.settings import checks, machine
from qat.settings.command_line import Program, main
from tests.conftest import ROOT

LINES = re.findall(
    r"^\.venv/bin/python (train|eval)\.py (.*)$", (ROOT / "README.md").read_text(), re.M
)
LINES += [
    ("train", line)
    for line in re.findall(
        r"^launch/node\.sh \d+ (.*?)\s*#", (ROOT / "README.md").read_text(), re.M
    )
]


def _param(name: str, line: str):
    """The jobs of a sweep are composed one by one, which takes seconds."""
    marks = [pytest.mark.slow] if line.startswith("-m ") else []
    return pytest.param(name, line, marks=marks, id=f"{name} {line}")


def test_there_are_commands() -> None:
    assert len([name for name, _ in LINES if name == "train"]) >= 6
    assert len([name for name, _ in LINES if name == "eval"]) >= 3


@pytest.mark.parametrize("profile", ["laptop", pytest.param("golf", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "line"), [_param(*line) for line in LINES])
def test_command(
    name: str, line: str, profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("RUN", "bits"):
        (tmp_path / "logs/runs" / folder).mkdir(parents=True)
    monkeypatch.setattr(machine, "detect_profile", lambda: (profile, "asked for by the test"))
    words = shlex.split(line, comments=True)
    launchers = [word for word in words if word.startswith("hydra/launcher=")]
    for launcher in launchers:  # its presence is checked, SLURM is not here
        assert (ROOT / "conf" / f"{launcher.replace('=', '/')}.yaml").is_file()
    arguments = [word for word in words if word not in launchers]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    seen = []
    resolve = train.resolve if name == "train" else checks.resolve_eval
    program = Program(
        name, resolve, lambda settings, job: seen.append(settings) or 0, after_sweep=lambda _: 0
    )
    assert main(program) == 0
    assert seen
