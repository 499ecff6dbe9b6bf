"""What W&B is given of a run, read back from the offline run's own file, without network."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
from pathlib import Path

import pytest
import wandb

import train as train_program
from qat.errors import PreemptedError, UserError
from qat.report import wandb_view
from qat.runs import wandb_log
from qat.runs.result import Result
from qat.runs.training_run import TrainingRun
from qat.settings import checks
from qat.settings.schema import LoggerSettings, TrainSettings
from tests.conftest import _call, result_of
from tests.made_up_study import made_up
from tests.offline_run import OfflineRun, read_offline_run


@pytest.fixture(scope="module")
def sweep(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two arms, logged."""
    parent = tmp_path_factory.mktemp("logged")
    with contextlib.chdir(parent):
        asked = ["qat=none,int6", "seed=7", "max_steps=12", "sweep_name=pair", "logger=wandb",
                 "logger.tags=[night]", "logger.every_steps=5"]  # fmt: skip
        done = _call("train.py", ["-m", *tiny, *asked])
    assert done.code == 0, done.err
    return parent / "logs" / "runs" / "pair"


@pytest.fixture(scope="module")
def runs(sweep: Path) -> dict[str, tuple[Path, OfflineRun]]:
    """By arm: the run's folder and what W&B keeps of it."""
    folders = [path.parent for path in sweep.glob("*/result.json")]
    return {result_of(folder)["qat"]: (folder, read_offline_run(folder)) for folder in folders}


@pytest.mark.parametrize("arm", ["none", "int6"])
def test_a_runs_group_tags_config_and_summary(runs, arm: str) -> None:
    folder, found = runs[arm]
    row = result_of(folder)
    assert (found.run.project, found.run.display_name) == ("qat", folder.name)
    assert (found.run.run_group, found.run.job_type) == ("pair", "train")
    assert sorted(found.run.tags) == sorted({arm, "seed7", row["grid"], "night"})
    assert found.config["arm"] == arm
    for key in ("seed", "max_steps", "model", "grid", "optimizer", "schedule"):
        assert found.config[key] == row["settings"][key], key
    assert row["val_bpb_artifact"] is not None
    for key in row.keys() - {"settings"}:
        assert found.summary[key] == row[key], key
    assert found.exit_code == 0


def test_history_is_metrics_csv(runs) -> None:
    for folder, found in runs.values():
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert len(rows) == 12
        history = [row for row in found.history if "train_loss" in row]
        assert [row["trainer/global_step"] for row in history] == [int(r["step"]) for r in rows]
        for key in ("train_loss", "elapsed_seconds", "rate", "qat_on"):
            assert [row[key] for row in history] == [float(r[key]) for r in rows], key


def test_the_view_names_only_what_runs_log(runs) -> None:
    _, found = runs["int6"]
    model = wandb_view.comparison_view(made_up(), "g", "", "qat")._to_model().model_dump()
    (runset,) = model["spec"]["section"]["run_sets"]
    for column in runset["run_feed"]["column_order"][1:]:
        kind, key = column.split(":")
        assert key in (found.config if kind == "config" else found.summary), column
    assert {"train_loss", "elapsed_seconds"} <= found.history[-1].keys()


def test_no_login_is_one_line(
    nobody_logged_in, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # the setting decides
    done = train("logger=wandb", "logger.offline=false", "run_name=refused")
    assert done.code == 2
    assert re.search(r"W&B refused \(No API key configured.*\); run `wandb login`", done.err)
    assert not (tmp_path / "logs").exists(), "the corrected command would find its name taken"


@pytest.mark.parametrize("left", ["x", "3-99999-tcp-localhost-9-9"])
def test_what_another_process_of_wandb_left_is_one_line(
    left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()  # what earlier tests of this process began, and tell of there
    os.environ.pop("WANDB_SERVICE", None)
    monkeypatch.setenv("WANDB_SERVICE", left)
    with pytest.raises(UserError, match=rf"^logger=wandb: WANDB_SERVICE={left}: .*; unset it$"):
        wandb_log.check_login(LoggerSettings(name="wandb", offline=True))


@pytest.mark.parametrize("variable", checks.WANDB_VARIABLES)
def test_variables_that_settings_stand_for(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "mine")
    checks.check_logger(LoggerSettings(name="csv"))
    with pytest.raises(UserError, match=f"logger=wandb: {variable}=mine is not obeyed: ") as no:
        checks.check_logger(LoggerSettings(name="wandb", group="other"))
    assert "\n" not in str(no.value)
    if variable in ("WANDB_PROJECT", "WANDB_RUN_GROUP"):
        checks.check_logger(LoggerSettings(name="wandb", project="mine", group="mine"))


def test_each_run_is_its_own_and_closed_when_preempted(train, tmp_path: Path, monkeypatch) -> None:
    def preempted(s: TrainSettings, run: TrainingRun) -> int:
        run._claim()
        run.loggers(0)
        raise PreemptedError(signal.SIGTERM)

    monkeypatch.setattr(train_program, "train", preempted)
    asked = ("logger=wandb", "logger.offline=true")
    assert train(*asked, "run_name=a").code == train(*asked, "run_name=b").code == 143
    ended = [read_offline_run(tmp_path / "logs/runs" / name) for name in "ab"]
    assert [run.exit_code for run in ended] == [143, 143]
    assert ended[0].run.run_id != ended[1].run.run_id


def test_a_run_outlives_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb_log.wandb, "teardown", lambda: None)
    said: list[str] = []
    monkeypatch.setattr(wandb_log.log, "warning", lambda text, *values: said.append(text % values))
    logger = wandb_log.OutlivedLogger(experiment=Gone())
    for step in (1, 2):
        logger.log_metrics({"train_loss": 1.0}, step)
    row = Result("r", "finished", 0, None, None, 1, "laptop", "none", "int8", "", "", None, 1)
    logger.finish(row, 0)
    assert said == ["W&B is gone (Connection lost); metrics.csv and result.json have it all"]


def test_tags_are_checked_before_a_run_starts(train, tmp_path: Path) -> None:
    done = train("logger=wandb", f"logger.tags=[{'a' * 65}]")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert f"logger.tags = {'a' * 65}: give tags of 1 to 64 characters" in done.err
    assert not (tmp_path / "logs").exists()


def test_without_wandb_it_is_one_line(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    done = train("logger=wandb", "max_steps=1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "pip install -e '.[wandb]'" in done.err


@pytest.mark.parametrize(("name", "value"), [("WANDB_SILENT", "nope"), ("WANDB_BASE_URL", "foo")])
def test_a_wrong_variable_is_named_before_a_folder_is_taken(
    name: str, value: str, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    done = train("logger=wandb", "run_name=r", "max_steps=1")
    assert done.code == 2
    assert f"logger=wandb: {name}={value}: " in done.err
    assert not Path("logs/runs/r").exists()
