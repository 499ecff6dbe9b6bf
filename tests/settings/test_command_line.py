"""Hydra's documented habits work or are refused by name; each setting's range; jobs of a sweep."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import eval as eval_program
import train as train_program
from qat.errors import UserError
from qat.runs.run_folder import read_overrides
from qat.settings import options
from qat.settings.command_line import Job, Program, main, register
from qat.settings.replay import replayed
from qat.settings.schema import EvalTaskSettings, TrainSettings, check_each
from tests.conftest import ROOT, result_of


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A grid, a study of it, and a sweep, in a folder of the user's."""
    folder = tmp_path / "my conf"
    for name, text in {
        "grid/mine.yaml": "bits: 5\nscale_rule: mse\n",
        "experiment/mine.yaml": "# @package _global_\nstudy:\n  seeds: [1]\n  grid: mine\n"
        "  arms: {none: {qat: none}, mine: {qat: mine}}\n  stores: {again: {grid: mine}}\n",
        "experiment/seeds.yaml": "# @package _global_\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper: {params: {seed: '1,-2'}}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def grid_shown(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("bits", "scale_rule"))]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["grid=mine", "qat=mine"])
def test_options_of_a_users_folder(setting: str, program, users_folder: Path) -> None:
    shown = ("-c", "job", "-p", "grid")
    for flags in (
        [f"--config-dir={users_folder}"],
        ["--config-dir", str(users_folder)],
        ["-cd", "my conf"],
        [f"hydra.searchpath=['file://{users_folder}']"],
    ):
        done = program("train.py", *flags, setting, *shown)
        assert (done.code, done.err) == (0, "")
        assert grid_shown(done.out) == ["bits: 5", "scale_rule: mse"]
    done = program("train.py", setting, *shown)
    group = setting.partition("=")[0]
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"error: {setting}: no such option; choose from binary, ")
    assert f" {'none' if group == 'qat' else 'lsq4'}, " in done.err
    assert program("train.py", "--config-dir=my conf", "--help").out.count("mine") == 3


def test_a_mistake_in_a_users_file_is_named(program, users_folder: Path) -> None:
    for name, text, message in (
        ("typo", "bitz: 4", "grid/typo.yaml: grid.bitz: Key 'bitz' not in 'Grid'"),
        ("word", "bits: four", "grid/word.yaml: grid.bits: Value 'four' of type 'str' could not"),
        ("far", "bits: 99", "grid.bits = 99: give 2 to 8"),
    ):
        (users_folder / f"grid/{name}.yaml").write_text(text)
        done = program("train.py", "profile=laptop", f"qat={name}", "--config-dir=my conf")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert done.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("experiment/x", b"{a: [}", "experiment/x.yaml, line 1: not YAML ("),
        ("model/x", b"dim: 3\n{a: [}", "model/x.yaml, line 2: not YAML ("),
        ("model/x", b"\xff", "a .yaml file of --config-dir or hydra.searchpath is not UTF-8 text"),
        (
            "model/x",
            b"a: \x01",
            "a .yaml file of --config-dir or hydra.searchpath is not UTF-8 text",
        ),
        ("experiment/x", b"seed: 3", "its first line has to be '# @package _global_'"),
        (
            "experiment/x",
            b"# @package _global_\nlimit_bytes: 16MB",
            "a plain number of bytes, 1 MB",
        ),
        (
            "grid/int6",
            b"bits: 4",
            "conf/grid/int6.yaml has this name and would be taken; rename it",
        ),
    ],
)
def test_a_users_file_that_is_of_no_use(
    name: str, content: bytes, message: str, program, users_folder: Path
) -> None:
    file = users_folder / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    asked = name.replace("/", "=").replace("grid=", "qat=")
    done = program("train.py", "profile=laptop", f"--config-dir={users_folder}", asked)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err


@pytest.mark.slow
def test_a_study_of_a_users_folder_runs(train, users_folder: Path) -> None:
    asked = ("experiment=mine", "max_steps=2", "sweep_name=s")
    done = train("-m", *asked, f"--config-dir={users_folder}")
    assert done.code == 0, done.err
    rows = [result_of(path.parent) for path in Path("logs/runs/s").glob("*/result.json")]
    assert sorted((row["qat"], row["grid"]) for row in rows) == [("mine", "int5_mse"),
                                                                ("none", "int8")]  # fmt: skip
    assert list(Path("logs/runs/s/none_s1/exports").glob("*int5_mse*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config-dir=nowhere",), "--config-dir=nowhere: no such folder"),
        (("hydra.searchpath=[nowhere]",), "hydra.searchpath=nowhere: no such folder"),
        (("--config-name=mine",), "--config-name: train.py is made of conf/train.yaml; add"),
        (("-cn", "eval"), "--config-name: train.py is made of conf/train.yaml; add"),
        (("--config-path=/conf",), "--config-path: train.py is made of conf/train.yaml; add"),
        (("--experimental-rerun=a.pickle",), "--experimental-rerun: a run goes on, or is"),
        (("-m", "seed=1,2", "--cfg=job"), "--multirun --cfg: give one of them"),
        (("--resolve",), "--resolve: goes with --cfg"),
        (("--cfg",), "argument --cfg/-c: expected one argument"),
        (("--info=plans",), "argument --info/-i: invalid choice: 'plans' (choose from 'all',"),
        (("eval=full",), "eval=full: eval has parts and no options here; give eval.NAME=VALUE"),
        (("--magic",), "--magic: no such flag; see `python train.py --hydra-help`"),
        (("-m", "hydra/sweeper=ax"), "hydra/sweeper=ax: sweeps are products of values here"),
        (("hydra.mode=MULTIRUN", "seed=1,-2"), "seed = -2: give 0 to 2^63"),
        (("-m", "qat=glob(int4*)", "seed=range(0,-2,-1)"), "seed = -1: give 0 to 2^63"),
        (("-m", "+hydra.sweeper.params.seed='1,-2'"), "seed = -2: give 0 to 2^63"),
        (("-m", "hydra.sweeper.params.seed='1,2'"), "add it, +hydra.sweeper.params.seed="),
        (("grid@plan.grids.fine=int8",), "add it, +grid@plan.grids.fine="),
    ],
)  # fmt: skip
def test_habits_that_are_refused(arguments: tuple[str, ...], message: str, program) -> None:
    done = program("train.py", "profile=laptop", *arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert message in done.err
    assert not Path("logs").exists()


@pytest.mark.slow
def test_help_is_cut_short_in_silence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    asked = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert asked.stdout is not None
    asked.stdout.close()  # as head does
    assert asked.communicate()[1] == ""


def test_a_sweep_by_an_experiment_alone(program, users_folder: Path) -> None:
    done = program("train.py", "profile=laptop", "experiment=seeds", "--config-dir=my conf")
    assert (done.code, done.err) == (2, "error: seed = -2: give 0 to 2^63 - 1\n")
    done = program("eval.py", "hydra.mode=MULTIRUN")
    assert done.err == "error: -m: eval.py does one thing at a time; drop -m\n"


def test_all_jobs_are_checked_once_before_the_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    happened: list[str] = []

    def resolve(settings: TrainSettings, choices: object) -> TrainSettings:
        happened.append(f"check {settings.seed}")
        return settings

    def run(settings: TrainSettings, job: Job) -> int:
        happened.append(f"run {settings.seed}")
        assert job.sweep_dir == Path("logs/runs") / settings.sweep_name
        return 0

    monkeypatch.setattr(sys, "argv", ["train.py", *tiny, "-m", "seed=1,2"])
    assert main(Program("train", resolve, run, after_sweep=lambda sweep: len(sweep.jobs))) == 2
    assert happened == ["check 1", "check 2", "check 1", "run 1", "check 2", "run 2"]
    assert len(list(Path("logs/runs").iterdir())) == 1  # one time is in all jobs' folder


@pytest.mark.parametrize("words", ["qat=", "--config-dir=conf qat="])
def test_shell_completion(words: str, users_folder: Path) -> None:
    """As bash does it: the script is evaluated, then asked with what stands on the line."""
    users_folder.rename(users_folder.with_name("conf"))
    script = subprocess.run(
        [sys.executable, ROOT / "train.py", "--shell-completion", "install=bash"],
        capture_output=True, text=True, cwd=users_folder.parent, check=True,
    )  # fmt: skip
    assert script.stderr == ""
    line = f"python train.py {words}"
    asked = subprocess.run(
        [sys.executable, ROOT / "train.py", "-sc", "query=bash"], capture_output=True, text=True,
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        cwd=users_folder.parent, check=True,
    )  # fmt: skip
    assert asked.stderr == ""
    assert {"qat=none", "qat=int6", "qat=rd", "qat=mixed_5_6_8"} <= set(asked.stdout.split())
    checked = 'eval "$1" && declare -F hydra_bash_completion'
    subprocess.run(["bash", "-c", checked, "-", script.stdout], check=True, capture_output=True)


def test_every_grid_is_a_qat_option_and_files_say_more() -> None:
    register([])
    stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().repo["qat"]}
    assert stored.isdisjoint(options.files("qat"))
    assert stored | set(options.files("qat")) == set(options.options("qat"))
    assert set(options.files("qat")) == {"none", "rd", "mixed_5_6_8", "int8_golf"}
    assert set(options.files("grid")) < set(options.options("qat"))


def ranges(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, what is said of a value out of range) of every field that has one."""
    found = []
    for of in dataclasses.fields(schema):
        if "check" in of.metadata:
            found.append((prefix + of.name, of.metadata["check"][1]))
        elif dataclasses.is_dataclass(of.default_factory):
            found += ranges(of.default_factory, f"{prefix}{of.name}.")  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("schema", [TrainSettings, EvalTaskSettings])
def test_what_is_out_of_range_is_named_as_typed(schema: type) -> None:
    found = ranges(schema)
    assert len(found) > 20
    for name, remedy in found:
        settings = schema()
        *groups, last = name.split(".")
        here = settings
        for group in groups:
            here = getattr(here, group)
        for of in (settings, *(getattr(settings, f.name) for f in dataclasses.fields(schema))):
            for field in dataclasses.fields(of) if dataclasses.is_dataclass(of) else ():
                if "check" in field.metadata and getattr(of, field.name) == "???":
                    setattr(of, field.name, None)
        if isinstance(settings, TrainSettings):
            settings.sweep_name = "s"
        check_each(settings)
        wrong: object = -1
        if "choose" in remedy or "letters" in remedy or "tags" in remedy:
            wrong = ""
        setattr(here, last, [wrong] if isinstance(getattr(here, last), list) else wrong)
        with pytest.raises(UserError) as refused:
            check_each(settings)
        assert str(refused.value) == f"{name} = {wrong}: {remedy}"


def test_overrides_are_read_back(tmp_path: Path) -> None:
    from qat.runs import run_folder

    typed = ["seed=1", "data.files=['/it\\'s: a # b.txt']", "x=é😀", "run_name=" + "n" * 200, "1"]
    run_folder.describe(tmp_path, "", typed, {}, 1)
    assert read_overrides(tmp_path) == typed
    (tmp_path / "overrides.yaml").write_text('- "seed=1"\n- "x=\\u00e9"\n')  # as JSON spells it
    assert read_overrides(tmp_path) == ["seed=1", "x=é"]


def test_an_option_of_a_users_folder_cannot_be_replayed_elsewhere() -> None:
    options.look_also_in([])
    choices = {"profile": "laptop", "qat": "mine", "grid": "mine"}
    with pytest.raises(UserError, match="qat=mine: not in conf/qat/; copy it there, too"):
        replayed(["qat=mine"], TrainSettings(), choices)
    assert replayed(["qat=int6"], TrainSettings(), choices | {"qat": "int6"})


def test_tasks_are_those_of_eval() -> None:
    for module in (*eval_program.TASKS.values(), eval_program.FULL):
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()
    assert train_program.PROGRAM.config_name == "train"
