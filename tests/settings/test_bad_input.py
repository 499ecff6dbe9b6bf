"""Every mistake: one clear line naming the setting as typed, exit code 2, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import GOLF, ROOT

NOT_A_MODEL = GOLF / "fp32_run.json"
SHARDS = (
    f"data.train_files={GOLF}/fineweb_train_*.bin",
    f"data.val_files={GOLF}/fineweb_val_*.bin",
)
CASES: list[tuple[tuple[str, ...], str]] = [
    (("seeed=1",), "seeed: unknown setting; did you mean seed?"),
    (("model.dimm=3",), "model.dimm: unknown setting; did you mean model.dim?"),
    (("+unknown=1",), "+unknown=1: unknown setting"),
    (("+qat.foo=1",), "+qat.foo=1: unknown setting"),
    (("++qat.foo=1",), "++qat.foo=1: unknown setting"),
    (("~seed",), "~seed: settings cannot be removed"),
    (("seed=abc",), "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    (("model.tie_embeddings=perhaps",), "model.tie_embeddings=perhaps"),
    (("qat=int66",), "qat=int66: no such option; choose from binary, "),
    (("data=wikipedia",), "data=wikipedia: no such option"),
    (("seed=1,2",), "seed=1,2: several values; add -m"),
    (("seed",), "seed: cannot be read as setting=value"),
    (("qat=int6", "qat.start_step=-1"), "qat.start_step = -1: give 0 or more"),
    (("qat.start_step=-1",), "qat.start_step = -1: give 0 or more"),
    (("qat=int6", "qat.start_step=5", "qat.start_fraction=0.5"), "2 starts"),
    (("qat=int6", "qat.start_fraction=1.5"), "qat.start_fraction = 1.5"),
    (("qat=int6", "grid=int4"), "qat=int6 grid=int4: training would simulate one grid"),
    (("qat=int6", "qat.start_step=5", "qat.start_lr_scale=0.5"), "2 starts; give one of them"),
    (("qat=int6", "qat.start_step=5", "qat.stop_step=3"), "qat.stop_step = 3: must be more than"),
    (("qat=int6", "qat.gradient=magic"), "qat.gradient = magic: choose from"),
    (("qat=fp8_e4m3", "qat.gradient=noise"), "qat.gradient = noise: not for fp8_e4m3"),
    (("qat=int8_golf", "plan=matrices"), "qat=int8_golf plan=matrices"),
    (("grid.levels=octal",), "grid.levels = octal"),
    (("grid.bits=40",), "grid.bits = 40: give 2 to 8"),
    (("grid.step_rule=max",), "grid.step_rule = max"),
    (("model.dim=66",), "model.dim = 66: must be a multiple of model.num_heads = 4"),
    (("model.dim=60",), "gives odd heads of 15"),
    (("model.num_kv_heads=3",), "model.num_kv_heads = 3: must divide model.num_heads = 4"),
    (("model.vocab_size=70000",), "model.vocab_size = 70000"),
    (("batch_tokens=100",), "batch_tokens = 100: must be a multiple of seq_len = 32"),
    (("micro_batch_tokens=16",), "micro_batch_tokens = 16"),
    (("max_steps=null",), "budget_seconds = null: max_steps is null too"),
    (("max_steps=0",), "max_steps = 0: give 1 or more"),
    (("budget_seconds=0",), "budget_seconds = 0"),
    (("budget_seconds=inf",), "budget_seconds = inf"),
    (("seed=99999999999999999999",), "seed = 99999999999999999999"),
    (("optimizer.matrix_lr=-1",), "optimizer.matrix_lr = -1.0"),
    (("optimizer.adam_beta1=1.5",), "optimizer.adam_beta1 = 1.5"),
    (("qat=null",), "must be a string"),
    (("runs_dir=/proc/no",), "runs_dir=/proc/no: cannot write there"),
    (("data.cache_dir=/proc/no",), "data.cache_dir=/proc/no: cannot write there"),
    (("limit_bytes=0",), "limit_bytes = 0: give 1 or more"),
    (("precision=fp8",), "precision = fp8: choose from auto, bf16, fp32"),
    (("compile=maybe",), "compile = maybe"),
    (("eval.precision=int8",), "eval.precision = int8"),
    (("artifact.coder=zip",), "artifact.coder = zip: choose from zlib, zstd"),
    (("run_name=a/b",), "run_name = a/b"),
    (("data.files=null", "data=text"), "data=text: give data.files"),
    (("data.files=[missing.txt]",), "data.files=missing.txt: no such file"),
    (("data.files=null", "data.val_files=nowhere_*.bin", f"data.tokenizer={GOLF}/tokenizer.model"),
     "data.val_files=nowhere_*.bin: no such file"),
    (("data.files=null", *SHARDS), "data.tokenizer is missing"),
    (("data.files=null", *SHARDS, f"data.tokenizer={NOT_A_MODEL}"), "not a SentencePiece model"),
    (("data.files=null", *SHARDS, f"data.tokenizer={GOLF}/tokenizer.model"),
     "model.vocab_size = 320: the tokenizer"),
    (("data.tokenizer=x.model",), "data.files and data.tokenizer name two sources"),
    (("seq_len=65536", "batch_tokens=65536", "micro_batch_tokens=65536"), "seq_len = 65536"),
    (("model.init_from=none.pt",), "model.init_from=none.pt: not weights of this model"),
    (("plan.rules={skip_weights: int9}",), "plan.rules: 'int9' for skip_weights"),
    (("-m", "seed=1,2", "run_name=same"), "run_name=same: 2 jobs would share it"),
    (("-m", "seed=1,-2"), "seed = -2: give 0 to 2^63"),
    (("-m", "qat=none,int6", "grid=int4"), "qat=int6 grid=int4"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[" ".join(c[0])[:60] for c in CASES])
def test_one_line_exit_2_and_nothing_left(
    overrides: tuple[str, ...], message: str, train, tmp_path: Path
) -> None:
    done = train(*overrides)
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.code == 2, done.err
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "something was left behind"


def test_a_used_name_is_refused_and_the_first_run_kept(train, tmp_path: Path) -> None:
    assert train("run_name=mine", "max_steps=1").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "logs/runs/mine").rglob("*") if p.is_file()}
    done = train("run_name=mine", "max_steps=1")
    assert done.code == 2
    assert "run_name=mine" in done.err
    assert {p: p.read_bytes() for p in before} == before


EVAL_CASES: list[tuple[tuple[str, ...], str]] = [
    ((), "artifact = null: give artifact=PATH or run=RUN"),
    (("task=scoer",), "task = scoer: choose from score, sample, report"),
    (("artefact=x",), "artefact: unknown setting; did you mean artifact?"),
    (("artifact=none.qat",), "artifact=none.qat: No such file"),
    (("run=nobody",), "run=nobody: no such folder"),
    (("task=report",), "runs = null: give a glob"),
    (("task=report", "runs=nothing/*"), "runs=nothing/*: no run folder found"),
    (("artifact=a.qat", "eval.precision=int4"), "eval.precision = int4"),
    (("artifact=a.qat", "data=web_bibel"), "data=web_bibel: no such option"),
]


@pytest.mark.parametrize(("arguments", "message"), EVAL_CASES, ids=lambda c: str(c)[:50])
def test_eval_mistakes(arguments: tuple[str, ...], message: str, program) -> None:
    done = program("eval.py", *arguments)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1, done.err
    assert message in done.err


def test_damaged_artifact_and_wrong_tokenizer(program, finished: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.qat"
    damaged.write_bytes((finished / "artifact.qat").read_bytes()[:-5])
    done = program("eval.py", f"artifact={damaged}")
    assert done.code == 2
    assert "truncated or damaged" in done.err
    done = program(
        "eval.py", f"artifact={finished}/artifact.qat", f"data.tokenizer={GOLF}/tokenizer.model",
        f"data.val_files={GOLF}/fineweb_val_*.bin",
    )  # fmt: skip
    assert done.code == 2
    assert "not the tokenizer this artifact was trained with" in done.err


def test_validation_text_that_is_gone_names_the_settings(program, finished: Path) -> None:
    done = program("eval.py", f"artifact={finished}/artifact.qat", "data.cache_dir=empty")
    assert done.code == 2
    assert "data.val_files" in done.err
    assert "data.files" in done.err


@pytest.mark.parametrize("arguments", [["seeed=1"], ["--help"], ["-m", "seed=1,2", "qat=int77"]])
def test_mistakes_and_help_do_not_wait_for_torch(arguments: list[str], tmp_path: Path) -> None:
    """As a real process: exit code, one line, and torch never imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(f"{arguments}: {time.perf_counter() - started:.2f} s")
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]


def test_profile_is_concrete_before_hydra_composes(program, monkeypatch) -> None:
    from qat.settings import command_line, machine

    monkeypatch.setattr(machine, "detect_profile", lambda: ("golf", "because"))
    assert command_line._with_profile(["seed=1"]) == ["seed=1", "profile=golf"]
    assert command_line._with_profile(["profile=auto", "a=1"]) == ["profile=golf", "a=1"]
    assert command_line._with_profile(["profile=laptop,auto"]) == ["profile=laptop,golf"]
    assert command_line._with_profile(["profile=laptop"]) == ["profile=laptop"]


def test_prose_and_paths_are_taken_as_typed() -> None:
    from qat.settings.command_line import _quote

    assert _quote("prompt=Hello, (world): it's") == "prompt='Hello, (world): it\\'s'"
    assert _quote("prompt='quoted'") == "prompt='quoted'"
    assert _quote("seed=3") == "seed=3"
