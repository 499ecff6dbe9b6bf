"""A run handed in: the folder's numbers are its files', and its one program trains it again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from qat.golf import submission_task as submission
from qat.golf.bundle import ROOT, code_files, count_code_bytes
from qat.model.spec import architectures
from tests.conftest import _call, first_on_path, result_of
from tests.test_torchrun import ENVIRONMENT

CHALLENGE_KEYS = ["author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb",
                  "bytes_total", "bytes_code"]  # fmt: skip
# In the file for runs that ask for them: W&B, CUDA, resume=RUN, and scoring.
ON_DEMAND = {
    "qat.runs.wandb_log", "qat.quantize.triton_kernels", "qat.model.triton_ops", "qat.runs.resume",
    "qat.artifact.class_coder", "eval", "qat.evaluation.score_task",
}  # fmt: skip
# What the file itself imports by name; Python lists only what import statements do.
BY_NAME = {
    "qat", "qat.settings", "qat.settings.command_line", "train", "hydra_plugins.qat_sweeper",
}  # fmt: skip
FOUND_BY_LOOKING = {f"qat.model.{name}" for name in architectures()} | {
    f"qat.quantize.{folder}.{path.stem}"
    for folder in ("levels", "gradients")
    for path in (ROOT / "qat" / "quantize" / folder).glob("*.py")
    if path.stem not in ("__init__", "learned", "identity")  # the switch and a rule import these
}


@pytest.fixture(scope="module")
def handed_in(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the task writes of the shared run."""
    out = tmp_path_factory.mktemp("handed") / "in" / "folder"
    done = _call("eval.py", ["task=submission", f"run={finished}", f"out={out}",
                             "submission.author=A. Person", "submission.github_id=person",
                             "submission.blurb=int6, (late) {start}"])  # fmt: skip
    assert done.code == 0, done.err
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    return out


def run_alone(
    command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """In an empty folder, where importing the project as it is installed here is an error."""
    other = folder / "other"
    for name in ("qat/__init__.py", "train.py", "eval.py"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("raise ImportError('not what the file holds')\n")
    empty = folder / "empty"
    empty.mkdir()
    return subprocess.run(
        command, cwd=empty, capture_output=True, text=True,
        env=(environment or dict(os.environ)) | first_on_path(other) | {"HOME": "/nonexistent"},
    )  # fmt: skip


def commands(handed_in: Path) -> list[list[str]]:
    """The lines to type of its README: pip, train, score."""
    text = (handed_in / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    return [shlex.split(block) for block in blocks]


def settings_of(run: Path) -> dict:
    settings = result_of(run)["settings"]
    # sweep_name is the time outside a sweep; a run that was forked is one of the same bits
    names = ("run_name", "sweep_name", "logger", "fork")
    return {key: value for key, value in settings.items() if key not in names}


def test_the_folder_holds_what_is_asked_for(handed_in: Path, finished: Path) -> None:
    assert {path.name for path in handed_in.iterdir()} == {
        "README.md", "submission.json", "train.log", "artifact.qat", "train_gpt.py"
    }  # fmt: skip
    row = result_of(finished)
    described = json.loads((handed_in / "submission.json").read_text())
    assert list(described) == [*CHALLENGE_KEYS, "seeds", "hardware"]
    for name in ("artifact.qat", "train.log"):
        assert (handed_in / name).read_bytes() == (finished / name).read_bytes()
    artifact_bytes = (handed_in / "artifact.qat").stat().st_size
    code_bytes = (handed_in / "train_gpt.py").stat().st_size
    assert described["bytes_code"] == code_bytes == count_code_bytes() == row["code_bytes"]
    assert described["bytes_total"] == artifact_bytes + code_bytes
    assert described["val_bpb"] == row["val_bpb_artifact"]
    assert described["val_loss"] == row["val_loss_artifact"]
    assert (described["name"], described["blurb"]) == ("shared", "int6, (late) {start}")
    assert (described["author"], described["github_id"]) == ("A. Person", "person")
    assert (described["seeds"], described["hardware"]) == ([1337], row["hardware"])
    readme = (handed_in / "README.md").read_text()
    for text in (f"{row['val_bpb_artifact']:.5f}", f"{row['quant_gap_bpb']:+.5f}",
                 f"{described['bytes_total']:,}", row["hardware"], "qat.start_step=5"):  # fmt: skip
        assert text in readme


def test_the_pip_line_has_the_projects_packages_as_installed(handed_in: Path) -> None:
    pip, _, _ = commands(handed_in)
    assert pip[:2] == ["pip", "install"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["train"]
    asked = {re.match(r"[\w-]+", line)[0] for line in lines}  # type: ignore[index]
    assert {"torch", "numpy", "lightning", "brotli"} <= asked
    assert not {"wandb", "torchao"} & asked
    pinned = dict(package.split("==") for package in pip[2:])
    assert set(pinned) == asked
    for name, version in pinned.items():
        assert metadata.version(name).split("+")[0] == version


@pytest.mark.slow
def test_it_trains_the_same_run_again(handed_in: Path, finished: Path, tmp_path: Path) -> None:
    """Equal settings and equal bytes, by the packed modules and no others."""
    _, train, _ = commands(handed_in)
    assert train == ["python", "train_gpt.py"]
    done = run_alone(
        [sys.executable, "-X", "importtime", str(handed_in / "train_gpt.py"), "run_name=again"],
        tmp_path,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(lines)
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["logs"]
    again = tmp_path / "empty" / "logs" / "runs" / "again"
    assert settings_of(again) == settings_of(finished)
    assert (again / "artifact.qat").read_bytes() == (finished / "artifact.qat").read_bytes()
    rows = result_of(again), result_of(finished)
    for key in ("val_bpb_artifact", "val_bpb_float", "code_bytes", "qat_steps", "data"):
        assert rows[0][key] == rows[1][key], key

    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    packed = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in code_files()
    }
    assert packed - imported == ON_DEMAND | BY_NAME | FOUND_BY_LOOKING


@pytest.mark.slow
def test_it_scores_the_artifact_as_the_run_did(
    handed_in: Path, finished: Path, tmp_path: Path
) -> None:
    _, _, score = commands(handed_in)
    assert score[:3] == ["python", "train_gpt.py", "artifact=artifact.qat"]
    artifact = f"artifact={handed_in / 'artifact.qat'}"
    done = run_alone(
        [sys.executable, str(handed_in / "train_gpt.py"), artifact, *score[3:]], tmp_path
    )
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    row = result_of(finished)
    assert printed["val_bpb"] == f"{row['val_bpb_artifact']:.10f}"
    assert printed["val_loss"] == f"{row['val_loss_artifact']:.10f}"
    assert int(printed["code_bytes"]) == (handed_in / "train_gpt.py").stat().st_size
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_two_ranks_train_it_and_another_start_goes_on(handed_in: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_alone(
        [*start, str(handed_in / "train_gpt.py"), "run_name=two"], tmp_path, ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "empty" / "logs" / "runs" / "two"
    assert (result_of(run)["steps"], result_of(run)["qat_steps"]) == (12, 7)
    (run / "result.json").unlink()
    shutil.move(tmp_path / "empty", tmp_path / "moved")
    resumed = run_alone(
        [sys.executable, str(handed_in / "train_gpt.py"), f"resume={tmp_path}/moved/logs/runs/two"],
        tmp_path,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert result_of(tmp_path / "moved" / "logs" / "runs" / "two")["status"] == "finished"


def copy_of(finished: Path, tmp_path: Path, **values: object) -> Path:
    """The shared run with another row."""
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "result.json").write_text(json.dumps(result_of(run) | values))
    return run


def refused(program, run: Path, *more: str) -> str:
    done = program("eval.py", "task=submission", f"run={run}", "out=out", *more)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert [path.name for path in Path.cwd().iterdir() if "out" in path.name] == []
    return done.err


@pytest.mark.slow
def test_an_oversize_run_is_refused(program, train) -> None:
    limit = count_code_bytes() + 1000
    assert train(f"limit_bytes={limit}", "run_name=big", "max_steps=1").code == 3
    row = result_of(Path("logs/runs/big"))
    total = row["artifact_bytes"] + row["code_bytes"]
    assert f"have {total} bytes and limit_bytes = {limit}" in refused(program, Path("big"))


def test_code_that_grew_since_the_run_is_refused(program, finished: Path, tmp_path: Path) -> None:
    row = result_of(finished)
    limit = row["artifact_bytes"] + row["code_bytes"] - 1
    run = copy_of(finished, tmp_path, limit_bytes=limit, code_bytes=row["code_bytes"] - 1)
    assert f"error: limit_bytes = {limit}: the artifact has" in refused(program, run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"status": "failed", "error": "loss is nan"}, "it failed (loss is nan); give a finished"),
        ({"artifact_bytes": 7}, "artifact.qat is not the file that its result is about"),
    ],
)
def test_rows_that_are_refused(program, finished: Path, tmp_path: Path, values, message) -> None:
    assert message in refused(program, copy_of(finished, tmp_path, **values))


@pytest.mark.slow
def test_folders_that_are_refused(program, finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    with open(run / "overrides.yaml", "a") as file:
        file.write("- " + json.dumps("data.repo_id=" + "x" * 2_048))
    assert "has 2048 for them; shorten them" in refused(program, run)
    (run / "overrides.yaml").write_text("no list\n")
    assert "not the folder of a run" in refused(program, run)
    (run / "train.log").unlink()
    (run / "overrides.yaml").write_text("")
    assert "train.log (No such file or directory)" in refused(program, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("init_from: null", "init_from: w.pt"))
    assert "began from model.init_from = w.pt" in refused(program, run)
    (run / "artifact.qat").write_bytes(b"no artifact")
    (run / "config.yaml").write_text(config)
    assert "not a readable artifact" in refused(program, run)
    (run / "result.json").unlink()
    assert "it has no result" in refused(program, run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out=x",), "run = null: give the run to submit"),
        (("artifact=a.qat", "out=x"), "artifact = a.qat: a submission is made of run=RUN"),
        (("run=.",), "out = null: give the folder to write"),
        (("run=.", "out=full"), "out=full: it is there already"),
        (("run=.", "out=full/file"), "out=full/file: it is there already"),
        (("run=.", "out=x", "submission.auhtor=me"), "did you mean submission.author?"),
    ],
)
def test_mistakes(program, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = program("eval.py", "task=submission", *arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_empty_folder_is_filled_and_a_failed_write_leaves_nothing(
    program, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    assert program("eval.py", "task=submission", f"run={finished}", "out=out").code == 0
    assert len(list((tmp_path / "out").iterdir())) == 5

    def no_space(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission.os, "replace", no_space)
    done = program("eval.py", "task=submission", f"run={finished}", "out=other")
    assert (done.code, done.err) == (
        2, "error: out=other: cannot write there (No space left on device)\n"
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_job_of_a_sweep_is_replayed_as_one_run(
    train, program, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment's own sweep, relative paths and environment variables stay behind."""
    (tmp_path / "My text.txt").write_bytes(corpus.read_bytes())
    monkeypatch.setenv("RATE", "0.03")
    done = train("-m", "experiment=pair", "seed=1", "sweep_name=s", "max_steps=2",
                 "logger.tags=[a]", "data.files=['My text.txt']",
                 "optimizer.matrix_lr=${oc.env:RATE}")  # fmt: skip
    assert done.code == 0, done.err
    monkeypatch.delenv("RATE")
    run = Path("logs/runs/s/int6_s1")
    done = program("eval.py", "task=submission", f"run={run}", "out=out")
    assert done.code == 0, done.err
    source = (tmp_path / "out" / "train_gpt.py").read_text()
    line = re.search(r"^OVERRIDES: list\[str\] = (\[.*?)\s*\]$", source, re.MULTILINE)
    assert line
    overrides = eval(line[1] + "]")
    assert {"experiment=pair", "arm=int6", "seed=1"} <= set(overrides)
    assert f"data.files=['{tmp_path}/My text.txt']" in overrides
    assert "optimizer.matrix_lr=0.03" in overrides
    assert not [o for o in overrides if o.startswith(("logger", "sweep_name"))]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = _call("train.py", [*overrides, "run_name=again"])
    assert done.code == 0, done.err
    again = Path("logs/runs/again")
    assert settings_of(again) == settings_of(tmp_path / run)
    scores = [result_of(folder)["val_bpb_artifact"] for folder in (again, tmp_path / run)]
    assert scores[0] == scores[1]
    assert result_of(again)["qat"] == "int6"
    assert (again / "artifact.qat").read_bytes() == (tmp_path / run / "artifact.qat").read_bytes()


@pytest.mark.slow
def test_training_takes_no_package_of_another_extra(tiny: list[str], tmp_path: Path) -> None:
    """``pip install -e '.[train]'`` is enough, and so is the pip line of a submission."""
    program = """
import runpy, sys
for name in ("wandb", "wandb_workspaces", "torchao", "bitsandbytes", "gguf", "ray", "submitit"):
    sys.modules[name] = None  # as if it were not installed
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", program, str(ROOT / "train.py"), *tiny, "qat=int6"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | first_on_path(ROOT), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
