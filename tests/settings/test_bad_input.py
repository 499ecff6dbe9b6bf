"""Every mistake: one clear line naming the setting as typed, exit code 2, nothing left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.errors import UserError
from qat.settings.arguments import groups
from qat.settings.checks import resolve_eval
from qat.settings.command_line import INTERRUPTED, Program, main
from qat.settings.schema import (
    EvalTaskSettings,
    StoreSettings,
    StudySettings,
    TrainSettings,
)
from qat.text.shards import ShardWriter
from tests.conftest import GOLF, ROOT
from train import resolve

NOT_A_MODEL = GOLF / "fp32_run.json"
SHARDS = (
    f"data.train_files={GOLF}/fineweb_train_*.bin",
    f"data.val_files={GOLF}/fineweb_val_*.bin",
)
CASES: list[tuple[tuple[str, ...], str]] = [
    (("seeed=1",), "seeed=1: unknown setting; did you mean seed?"),
    (("model.dimm=3",), "model.dimm=3: unknown setting; did you mean model.dim?"),
    (("seed.more=1",), "seed.more=1: seed takes one value, it has no parts"),
    (("model.more.x=1",), "model.more.x: gpt has no such size; it has none"),
    (("+qat=int6",), "qat: it has a place already; give it once, without '+'"),
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
    (("qat.start_step=-1",), "qat.start_step = -1: give 0 or more"),
    (("qat=int6", "grid=int4"), "qat=int6 grid=int4: training would simulate one grid"),
    (("qat=int8_golf", "plan=matrices"), "qat=int8_golf plan=matrices"),
    (("grid.bits=40",), "grid.bits = 40: give 2 to 8"),
    (("model.dim=66",), "model.dim = 66: must be a multiple of model.num_heads = 4"),
    (("qat=null",), "qat=null: no such option; choose from binary, "),
    (("qat=",), "qat=: no such option"),
    (("qat=[int6]",), "qat=[int6]: no such option"),
    (("qat=6",), "qat=6: no such option; choose from binary, "),
    (("-m", "qat=none,[int6]"), "no such option"),
    (("averaging=ema", "averaging.decay=1"), "averaging.decay = 1: give"),
    (("optimizer.name=sgd",), "optimizer.name = sgd: choose from muon, normuon, adamw"),
    (("model.dim=400000000000000",), "no computer holds such tensors"),
    (("data.files=words.txt",), "data.files=words.txt: give a list, [a,b]"),
    (("data.files=[/]",), "data.files: /: give .txt"),
    (("runs_dir=/proc/no",), "runs_dir=/proc/no: cannot write there"),
    (("data.cache_dir=/proc/no",), "data.cache_dir=/proc/no: cannot write there"),
    (("data.files=null", "data=text"), "data=text: give data.files"),
    (("data.files=[missing.txt]",), "data.files=missing.txt: no such file"),
    (("data.files=null", "data.val_files=nowhere_*.bin", f"data.tokenizer={GOLF}/tokenizer.model"),
     "data.val_files=nowhere_*.bin: no such file"),
    (("data.files=null", *SHARDS), "data.tokenizer is missing"),
    (("data.files=null", *SHARDS, f"data.tokenizer={NOT_A_MODEL}"), "not a SentencePiece model"),
    (("data.files=null", *SHARDS, f"data.tokenizer={GOLF}/tokenizer.model"),
     "model.vocab_size = 320: the tokenizer"),
    (("seq_len=65536", "batch_tokens=65536", "micro_batch_tokens=65536"), "seq_len = 65536"),
    (("grid.levels=octal",), "grid.levels = octal"),
    (("grid.scale_rule=max",), "grid.scale_rule = max"),
    (("model.init_from=none.pt",), "model.init_from=none.pt: not weights of this model"),
    (("plan.rules={skip_weights: int9}",), "plan.rules: 'int9' for skip_weights"),
    (("-m", "seed=1,2", "run_name=same"), "run_name=same: 2 jobs would share it"),
    (("-m", "experiment=pair,bits"), "experiment=pair,bits: give one study at a time"),
    (
        ("-m", "experiment=pair", "hydra/launcher=node", "hydra.launcher.ranks=2", "ledger=full"),
        "ledger=full: by hydra/launcher=node its runs of equal steps would have one rank",
    ),
    (("-m", "seed=1,-2"), "seed = -2: give 0 to 2^63"),
    (("-m", "qat=none,int6", "grid=int4"), "qat=int6 grid=int4"),
]  # fmt: skip
# Of checks like those above: the program is not started, only its checks are.
VALUES: list[tuple[tuple[str, ...], str]] = [
    (("qat=int6", "qat.start_step=-1"), "qat.start_step = -1: give 0 or more"),
    (("qat=int6", "qat.start_step=5", "qat.start_fraction=0.5"), "2 starts"),
    (("qat=int6", "qat.start_fraction=1.5"), "qat.start_fraction = 1.5"),
    (("qat=int6", "qat.start_step=5", "qat.start_lr_scale=0.5"), "2 starts; give one of them"),
    (("qat=int6", "qat.start_step=5", "qat.stop_step=3"), "qat.stop_step = 3: must be more than"),
    (("qat=int6", "qat.gradient=magic"), "qat.gradient = magic: choose from"),
    (("qat=fp8_e4m3", "qat.gradient=noise"), "qat.gradient = noise: not for fp8_e4m3"),
    (("qat=int6", "qat.gradient_strength=0.3"), "qat.gradient_strength = 0.3: identity has none"),
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
    (("optimizer.matrix_lr=-1",), "optimizer.matrix_lr = -1: give"),
    (("optimizer.adam_beta1=1.5",), "optimizer.adam_beta1 = 1.5"),
    (("qat=int6", "qat.start_lr_scale=0.5", "schedule.warmdown_steps=0"), "the rate never falls"),
    (("qat=int6", "qat.start_lr_scale=0.1", "schedule.floor=0.2"), "never falls below 0.2"),
    (("schedule.warmdown_fraction=0.4",), "two warmdowns; add schedule.warmdown_steps=null"),
    (("schedule=fraction", "schedule.warmdown_fraction=0"), "schedule.warmdown_fraction = 0"),
    (("schedule.floor=1",), "schedule.floor = 1: give 0 or more, below 1"),
    (("averaging.kind=mean",), "averaging.kind = mean: choose from none, ema, swa"),
    (("averaging=swa", "averaging.of=codes"), "averaging.of = codes: choose from"),
    (("averaging.every_steps=0",), "averaging.every_steps = 0"),
    (("data.files=[]",), "data.files = []: name a file"),
    (("limit_bytes=0",), "limit_bytes = 0: give 1 or more"),
    (("limit_bytes=1000",), "limit_bytes = 1000: the code alone has "),
    (("eval.max_tokens=0",), "eval.max_tokens = 0: give 1 or more, null for all of them, or auto"),
    (("eval.max_tokens=all",), "eval.max_tokens = all: give 1 or more, null for all"),
    (("precision=fp8",), "precision = fp8: choose from auto, bf16, fp32"),
    (("compile=maybe",), "compile = maybe"),
    (("eval.precision=int8",), "eval.precision = int8"),
    (("artifact.coder=zip",), "artifact.coder = zip: choose from zlib, zstd"),
    (("run_name=a/b",), "run_name = a/b"),
    (("run_name=" + "n" * 129,), "'-' only, 128 bytes at most"),
    (("logger.project=a/b",), "logger.project = a/b: use 1 to 128 letters"),
    (("logger.group=" + "n" * 129,), "use 1 to 128 letters"),
    (("qat=int6", "plan.rotate=48"), "plan.rotate = 48: give a power of two from 2 to 1024"),
    (("qat=q8_0", "plan.rotate=32"), "plan.rotate = 32: not of q8_0 levels; give null"),
    (("qat=rd", "plan.rotate=32"), "plan.rotate = 32: not of column_scales; give null"),
    (("qat=int6", "grid.rotate=32"), "grid.rotate = 32: give plan.rotate, of all matrices"),
    (("data.tokenizer=x.model",), "data.files and data.tokenizer name two sources"),
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


@pytest.fixture(scope="module")
def composed(tiny: list[str]) -> Callable[..., tuple[TrainSettings, Mapping[str, str | None]]]:
    """composed(*choices of groups): what ``resolve`` gets, composed once by the program."""

    @cache
    def compose(*choices: str) -> tuple[TrainSettings, Mapping[str, str | None]]:
        seen: list[tuple[TrainSettings, Mapping[str, str | None]]] = []
        look = Program("train", lambda *asked: seen.append(asked), lambda settings, job: 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *tiny, *choices])
            assert main(look) == 0
        return seen[0]

    return compose


def with_value(settings: Any, key: str, value: Any) -> Any:
    """A copy of settings with another value of one setting, by its dotted name."""
    name, _, inner = key.partition(".")
    if inner:
        value = with_value(getattr(settings, name), inner, value)
    elif isinstance(getattr(settings, name), float):
        value = float(value)
    return replace(settings, **{name: value})


def resolved(composed: Callable, overrides: tuple[str, ...]) -> TrainSettings:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    names = groups("train")
    settings, choices = composed(*(str(o.input_line) for o in parsed if o.key_or_group in names))
    for key, value in [(o.key_or_group, o.value()) for o in parsed if o.key_or_group not in names]:
        settings = with_value(settings, key, value)
    return resolve(settings, choices)


@pytest.mark.parametrize(
    ("overrides", "message"), VALUES, ids=[" ".join(c[0])[:60] for c in VALUES]
)
def test_values_that_the_checks_refuse(
    overrides: tuple[str, ...], message: str, composed, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        resolved(composed, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (StoreSettings(method="gtpq"), "study.stores.x.method = gtpq: choose from round, gptq"),
        (StoreSettings(gptq_bit_price=2.0), "study.stores.x.gptq_bit_price = 2: only with method"),
        (StoreSettings(arms=["int33"]), "study.stores.x.arms = int33: no such arm; choose from no"),
    ],
)
def test_stores_of_a_study_that_the_checks_refuse(
    store: StoreSettings, message: str, composed
) -> None:
    settings, choices = composed()
    study = StudySettings(stores={"x": store}, arms={"none": {}})
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(replace(settings, study=study), choices)


def test_a_used_name_is_refused_and_the_first_run_kept(train, tmp_path: Path) -> None:
    assert train("run_name=mine", "max_steps=1").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "logs/runs/mine").rglob("*") if p.is_file()}
    done = train("run_name=mine", "max_steps=1")
    assert done.code == 2
    assert "run_name=mine" in done.err
    assert {p: p.read_bytes() for p in before} == before


EVAL_CASES: list[tuple[tuple[str, ...], str]] = [
    ((), "artifact = null: give artifact=PATH or run=RUN"),
    (("task=scoer",),
     "task = scoer: choose from score, sample, inspect, fill, audit, cabinet"),
    (("artefact=x",), "artefact=x: unknown setting; did you mean artifact?"),
    (("artifact=none.qat",), "artifact=none.qat: No such file"),
    (("artifact=it's (a) [file], ${seed}",), "artifact=it's (a) [file], ${seed}: No such file"),
    (("qat=int6",), "qat=int6: unknown setting; see"),
    (("-m", "seed=1,2"), "-m: eval.py does one thing at a time"),
    (("artifact.coder=mix",), "artifact.coder=mix: artifact takes one value, it has no parts"),
    (("run=nobody",), "run=nobody: no such folder"),
    (("task=report",), "runs = null: give study=NAME or a glob"),
    (("task=report", "runs=nothing/*"), "runs=nothing/*: no run folder found"),
    (("artifact=a.qat", "eval.precision=int4"), "eval.precision = int4"),
    (("artifact=a.qat", "data=web_bibel"), "data=web_bibel: no such option"),
]  # fmt: skip


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["seeed=1"],
        pytest.param(["--help"], marks=pytest.mark.slow),
        pytest.param(["-m", "seed=1,2", "qat=int77"], marks=pytest.mark.slow),
    ],
)
def test_mistakes_and_help_do_not_wait_for_torch(arguments: list[str], tmp_path: Path) -> None:
    """As a real process: exit code, one line, and torch never imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(f"{arguments}: {time.perf_counter() - started:.2f} s")
    assert done.returncode == (0 if "--help" in arguments else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert "torch" not in imported


def test_profile_is_concrete_before_hydra_composes(program, monkeypatch) -> None:
    from qat.settings import machine
    from qat.settings.arguments import with_profile

    monkeypatch.setattr(machine, "detect_profile", lambda: ("golf", "because"))
    assert with_profile(["seed=1"]) == ["seed=1", "profile=golf"]
    assert with_profile(["profile=auto", "a=1"]) == ["profile=golf", "a=1"]
    assert with_profile(["profile=laptop,auto"]) == ["profile=laptop,golf"]
    assert with_profile(["profile=laptop"]) == ["profile=laptop"]


@pytest.mark.parametrize(
    "prose",
    ["Hello, (world): it's", r"a\b\\c", "${seed}", "'quoted", "null", "", "\\", r"\'\${a}\\${b}\\",
     "a\n${oc.env:'HOME'}", '"${', "[1, {a: 2}]"],
)  # fmt: skip
def test_prose_is_taken_as_typed(prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalTaskSettings] = []
    typed = ["eval.py", f"prompt={prose}", f"submission.name={prose}"]
    monkeypatch.setattr(sys, "argv", typed)
    look = Program("eval", lambda settings, _: seen.append(settings), lambda settings, job: 0)
    assert main(look) == 0
    assert (seen[0].prompt, seen[0].submission.name) == (prose, prose)


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param("--help", marks=pytest.mark.slow),
        pytest.param("--hydra-help", marks=pytest.mark.slow),
        "--version",
        "--cfg=job",
        "--info=all",
    ],
)
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_questions_are_answered_and_nothing_else_said(script: str, flag: str, program) -> None:
    done = program(script, flag)
    assert (done.code, done.err) == (0, "")
    assert "command_line" not in done.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "there is no text to train on"),
        ("half.jsonl", rb'{"text": "\ud800"}', "half.jsonl, line 1: half of a surrogate pair"),
        ("latin.txt", b"caf\xe9", "latin.txt, line 1: not UTF-8 text (byte 0xe9)"),
    ],
)
def test_text_that_cannot_be_used(
    name: str, content: bytes, message: str, train, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    done = train(f"data.files=[{name}]", "data.cache_dir=cache")
    assert done.code == 2
    assert message in done.err
    left = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert left == [".lock"]


@pytest.mark.slow
def test_shards_with_notes_of_somebody_else_and_an_empty_tokenizer(train, tmp_path: Path) -> None:
    for file in GOLF.glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    given = ("data.files=null", "data.train_files=fineweb_train_*.bin", "model.vocab_size=512",
             "data.val_files=fineweb_val_*.bin", "max_steps=1")  # fmt: skip
    for notes in ("[1]", "{}", "no json"):
        (tmp_path / "notes.json").write_text(notes)
        done = train(*given, f"data.tokenizer={GOLF}/tokenizer.model")
        assert done.code == 0, done.err
    (tmp_path / "empty.model").touch()
    done = train(*given, "data.tokenizer=empty.model")
    assert done.code == 2
    assert "data.tokenizer=empty.model: not a SentencePiece model (the file is empty)" in done.err


def test_validation_text_of_no_bytes_is_found_before_training(train, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val")
    writer.write([1] * 500)
    writer.close()
    done = train("data.files=null", f"data.train_files={GOLF}/fineweb_train_*.bin",
                 "data.val_files=val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model",
                 "model.vocab_size=512")  # fmt: skip
    assert done.code == 2
    assert "data.val_files: its tokens stand for no bytes of text" in done.err
    assert not (tmp_path / "logs").exists()


def test_a_sweep_needs_a_folder_of_its_own(train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = train("-m", "seed=1,2", "runs_dir=file", "max_steps=1")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "runs_dir=file: cannot write there" in done.err
    (tmp_path / "logs/runs/mine").mkdir(parents=True)
    done = train("-m", "seed=1,2", "sweep_name=mine")
    assert done.code == 2
    assert "sweep_name=mine: logs/runs/mine is there already" in done.err


def _end_of_eval(run, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["eval.py", "artifact=x"])
    return main(Program("eval", resolve_eval, run))


def test_a_bug_in_a_task_is_not_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(settings: object, job: object) -> int:
        raise ValueError("a bug of ours")

    assert _end_of_eval(bug, monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: object, job: object) -> int:
        raise KeyboardInterrupt

    assert _end_of_eval(interrupted, monkeypatch) == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"
