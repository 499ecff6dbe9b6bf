"""What is typed to get a run's settings again."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.settings.replay import replayed, score_arguments
from qat.settings.schema import TrainSettings

CHOICES = {"profile": "golf", "qat": "int6", "data": "text", "experiment": None}


@pytest.fixture
def settings() -> TrainSettings:
    s = TrainSettings(seed=3)
    s.data.files, s.data.cache_dir = ["/My texts/it's.txt", "/b,c.txt"], "cache"
    s.eval.batch_tokens = 2_048
    return s


def test_places_and_names_are_left_out_and_paths_are_absolute(settings: TrainSettings) -> None:
    typed = ["qat=int6", "run_name=r", "runs_dir=d", "sweep_name=s", "logger=wandb",
             "logger.tags=[a]", "profile=auto", "data.files=[it.txt]", "data=text",
             "data.tokenizer=null", "+model.dim=64"]  # fmt: skip
    assert replayed(typed, settings, CHOICES) == [
        "profile=golf", "qat=int6", "data=text", "data.tokenizer=null", "+model.dim=64",
        r"data.files=['/My texts/it\'s.txt','/b,c.txt']",
    ]  # fmt: skip


def test_the_environment_is_not_asked_again(
    settings: TrainSettings,
) -> None:
    settings.data.files = None
    settings.plan.rules = {"*.mlp.*": "fp16"}
    typed = ["qat=${oc.env:ARM}", r"seed=$\{oc.env\:SEED\}", "plan.rules={'*.mlp.*':${oc.env:D}}"]
    assert replayed(typed, settings, CHOICES) == [
        "profile=golf", "qat=int6", "seed=3", "plan.rules={*.mlp.*:'fp16'}",
    ]  # fmt: skip


def test_what_scoring_needs_beside_the_artifact(settings: TrainSettings) -> None:
    assert score_arguments(settings) == [
        r"data.files=['/My texts/it\'s.txt','/b,c.txt']", "data.cache_dir='cache'",
        "eval.batch_tokens=2048",
    ]  # fmt: skip
    assert score_arguments(TrainSettings()) == []


def test_hydra_reads_the_replayed_words_back(program, tmp_path: Path, settings) -> None:
    words = replayed(["seed=$3", "model.init_from=$x"], settings, CHOICES | {"experiment": "x"})
    done = program("train.py", *words, "--cfg=job")
    assert done.code == 0, done.err
    lines = set(done.out.splitlines())
    assert {"seed: 3", "  init_from: null", "profile: golf", "  - /My texts/it's.txt"} <= lines
    assert "  - /b,c.txt" in lines
