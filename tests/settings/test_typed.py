"""What people type at a setting is what it gets: paths, names, numbers, in any letters."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString

from qat.errors import UserError
from qat.settings.arguments import SCHEMAS, check_settings, groups, split_flags
from qat.settings.checks import TEXT_VOCAB_SIZE, find_run
from qat.settings.command_line import Program, main
from qat.settings.schema import DataSettings, EvalTaskSettings, TrainSettings, check_each
from qat.settings.typed import kinds, spelled
from qat.text.source import matching
from qat.text.tokenizer import SMALLEST_VOCAB_SIZE


@cache
def of_program(name: str) -> tuple[dict[str, object], set[str]]:
    return kinds(SCHEMAS[name]), groups(name)


def read(argument: str, name: str = "train", is_sweep: bool = False) -> object:
    """What Hydra makes of it."""
    (word,) = spelled([argument], *of_program(name), is_sweep)
    value = OverridesParser.create().parse_override(word).value()

    def plain(value: object) -> object:
        if isinstance(value, QuotedString):
            return value.text
        if isinstance(value, ChoiceSweep):
            return tuple(map(plain, value.list))
        return [*map(plain, value)] if isinstance(value, list) else value

    return plain(value)


@pytest.mark.parametrize(
    "path",
    ["~/a", "é ü", "ca[1]che", "[x]", "[x]/y", "my (1)", "{x}", "a{x}b", "it's", "a=b:c", "#x",
     "a&b;c!d", "1.50", "007", "1e5", "1_000", "true", "-1", "[a,b]c", "日本", '"', "a'b'",
     "(a,b)c", "a)b", "^<>?`"],
)  # fmt: skip
def test_text_is_taken_as_typed(path: str) -> None:
    assert read(f"runs_dir={path}") == path
    assert read(f"data.files=[{path},b.txt]") == [path, "b.txt"]
    assert read(f"runs_dir={path},b", is_sweep=True) == (path, "b")
    assert read("runs_dir=a]b") == "a]b"


def test_what_hydra_reads_rightly_is_left_to_it() -> None:
    for word in ("run_name=a", "run_name=null", "run_name=", "run_name=${seed}", "seed=1", "~seed",
                 "run_name='a b'", "data.files=['a]b,c',d]", "data.files=[]", "data.files=null",
                 "qat=6", "qat=[int6]", "runs_dir=choice(a,b)", "data.files=[a],[b]", "seed",
                 "plan.rules={skip_weights: fp16}", "study.seeds=[1,2]",
                 "run_name=a\\,b"):  # fmt: skip
        assert spelled([word], *of_program("train"), False) == [word]
    assert read("qat=é,int6", is_sweep=True) == ("é", "int6")
    assert read("hydra.searchpath=[m[1] é]") == ["m[1] é"]
    assert read("hydra.searchpath=[~/c,file://~/c]") == [
        f"{h}{Path.home()}/c" for h in ("", "file://")
    ]
    assert read("artifact=a,b ~", "eval") == "a,b ~"
    assert read('out="~/s"', "eval") == read("out='~/s'", "eval") == "~/s"
    assert read('prompt="a"', "eval") == '"a"'
    assert read("data.files=[${oc.env:A,b}/é]") == ["${oc.env:A,b}/é"]


@pytest.mark.parametrize(
    ("typed", "number"),
    [("1e7", 10_000_000), ("1.5e6", 1_500_000), ("16_000_000", 16_000_000), ("8.0", 8),
     ("1.5", 1.5), ("1e-3", 1e-3)],
)  # fmt: skip
def test_whole_numbers(typed: str, number: float) -> None:
    value = read(f"limit_bytes={typed}")
    assert value == number
    assert isinstance(value, type(number))
    assert read(f"limit_bytes={typed},2", is_sweep=True) == (number, 2)
    assert spelled(["x=8", "x=auto"], {"x": int | str | None}, (), False) == ["x=8", "x=auto"]


def test_numbers_with_commas_are_refused_by_name() -> None:
    for typed, one, is_sweep in (
        ("limit_bytes=16,000,000", "limit_bytes=16_000_000", False),
        ("limit_bytes=16,000,000", "limit_bytes=16_000_000", True),
        ("budget_seconds=0,5", "budget_seconds=0.5", False),
    ):
        with pytest.raises(UserError) as refused:
            read(typed, is_sweep=is_sweep)
        assert str(refused.value) == f"{typed}: commas separate several values; one is {one}"
    assert read("seed=1,100,200", is_sweep=True) == (1, 100, 200)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("modle={dim: 3}", "modle={dim: 3}: unknown setting; did you mean model?"),
        ("model={dim: 3}", "model={dim: 3}: give model.dim=VALUE instead"),
        ("model={dimm: 3}", "model.dimm: unknown setting; did you mean model.dim?"),
        ("init_from=~/w.pt", "init_from=~/w.pt: unknown setting; did you mean model.init_from?"),
        ("optimizer.lr=1", "optimizer.lr=1: unknown setting; did you mean optimizer.head_lr?"),
        ("eval=3", "eval=3: eval has parts and no options here; give eval.NAME=VALUE"),
        (
            "prompt=x",
            "prompt=x: unknown setting; see `python train.py --cfg job`; it is one of eval",
        ),
        (
            "study.seeds=[1]",
            "study.seeds=[1]: a study is as its file says; of it give arm=, seed=, ",
        ),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: the folders of runs are runs_dir"),
        ("hydra.sweep.dir=x", "hydra.sweep.dir=x: the folders of runs are runs_dir"),
    ],
)
def test_mistakes_are_named_as_typed(typed: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_settings([typed], "train")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("sample.prompt=x", "sample.prompt=x: unknown setting; did you mean prompt?"),
        ("max_tokens=5", "max_tokens=5: unknown setting; did you mean eval.max_tokens?"),
    ],
)
def test_a_name_of_another_group_is_what_was_meant(typed: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_settings([typed], "eval")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("limit_bytes=16MB", "to Integer; give a plain number of bytes, 1 MB = 1000000"),
        ("budget_seconds=10min", "to Float; give a plain number of seconds, 1 min = 60"),
        ("seed=1.5", "to Integer; give a whole number"),
        ("max_steps=inf", "to Integer; give a whole number"),
        ("seed=range(1,1)", "seed=range(1,1): no values, so nothing to run"),
        ("qat=glob(nothing*)", "qat=glob(nothing*): no values, so nothing to run"),
        ("seed=1\n", "seed=1\\n: cannot be read as setting=value"),
        ("runs_dir=${HOME}/x", "runs_dir, sweep_name: Interpolation key 'HOME' not found"),
        ("hydra=1", "hydra=1: unknown setting"),
        ("eval.stride=999", "eval.stride = 999: must be at most eval.seq_len = 256 (null: seq_len"),
        ("seed=null", "seed=null: give a value, not null"),
        ("seed =3", "seed =3: cannot be read as setting=value"),
        ("seed:3", "seed:3: cannot be read as setting=value"),
        ("plan.rules={~a: grid}", "plan.rules={~a: grid}: cannot be read as setting=value"),
        ("hydra.searchpath=./my", "hydra.searchpath=./my: give a list, hydra.searchpath=[DIR]"),
        ("+hydra.sweeper.params.sed='1,2'", "sed=1,2: unknown setting; did you mean seed?"),
    ],
)
def test_one_line(typed: str, message: str, program) -> None:
    done = program("train.py", "-m", "profile=laptop", typed)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the schema, those whose names say path or file too; in lists; as a user's file says it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/my/experiment").mkdir(parents=True)
    (tmp_path / "home/my/experiment/e.yaml").write_text(
        "# @package _global_\ndata: {tokenizer: ~/t, val_files: '~/v*'}\n", encoding="utf-8"
    )
    seen: list[TrainSettings | EvalTaskSettings] = []
    swept: list[Path | None] = []

    def run(settings: TrainSettings | EvalTaskSettings, job) -> int:
        seen.append(settings)
        swept.append(job.sweep_dir)
        return 0

    for name, words in {
        "train": ["-m", "profile=laptop", "experiment=e", "--config-dir=~/my", "runs_dir=~/r",
                  "data.files=[~/a.txt,b]", "model.init_from=~/i", "data.cache_dir=~"],
        "eval": ["artifact=~/a", "out=~/o", "runs=~/r/*", "cabinet=~/c", "eval.pairs_file=~/p",
                 "study=~", "run=~/r", "runs_dir=~/r"],
    }.items():  # fmt: skip
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        after = (lambda sweep: 0) if name == "train" else None
        assert main(Program(name, lambda settings, _: settings, run, after_sweep=after)) == 0
    home = str(tmp_path / "home")
    trained, scored = seen
    assert isinstance(trained, TrainSettings)
    assert isinstance(scored, EvalTaskSettings)
    assert trained.data.files == [f"{home}/a.txt", "b"]
    assert (trained.data.tokenizer, trained.data.val_files) == (f"{home}/t", f"{home}/v*")
    assert (trained.model.init_from, trained.data.cache_dir) == (f"{home}/i", home)
    assert swept[0] is not None
    assert swept[0].parent == Path(trained.runs_dir) == tmp_path / "home/r"
    assert not (tmp_path / "~").exists()
    paths = (scored.artifact, scored.out, scored.runs, scored.cabinet, scored.eval.pairs_file,
             scored.study, scored.run, scored.runs_dir)  # fmt: skip
    assert all(path is not None and path.startswith(home) for path in paths)


def test_names_too_long_are_named() -> None:
    too_long = DataSettings(files=["a", f"d/{'n' * 256}.txt"])
    told = r"^data.files = d/n+\.txt: a file's name has 255 bytes at most$"
    with pytest.raises(UserError, match=told):
        check_each(too_long, "data.")
    check_each(DataSettings(files=["d/" * 200]), "data.")
    with pytest.raises(UserError, match=r"^run=n+: no such folder"):
        find_run("run", "n" * 300, "logs/runs")


def test_a_path_that_is_there_is_no_pattern(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("g[1]/a[b].txt", "g[1]/ab.txt", "g1/z.txt", "[x].txt", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pattern, found in {
        "g[1]/a[b].txt": ["g[1]/a[b].txt"], "g[1]/a[bc].txt": ["g[1]/ab.txt"],
        "g[1]/*.txt": ["g[1]/a[b].txt", "g[1]/ab.txt"], "g[12]/*": ["g1/z.txt"],
        "[x].txt": ["[x].txt"], "[x]*t": ["x.txt"], "g[1]": ["g[1]"], "nope/*": [],
    }.items():  # fmt: skip
        assert [str(path) for path in matching(pattern)] == found
        absolute = [str(path) for path in matching(f"{tmp_path}/{pattern}")]
        assert absolute == [f"{tmp_path}/{name}" for name in found]


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--config-name=x", "in DIR/eval/"), ("--experimental-rerun=x", "type it once more")],
)
def test_what_eval_refuses_names_its_own_ways(flag: str, told: str) -> None:
    with pytest.raises(UserError, match=f"{told}$"):
        split_flags([flag], "eval")


def test_the_smallest_vocabulary_that_is_advised_works() -> None:
    assert TEXT_VOCAB_SIZE == SMALLEST_VOCAB_SIZE
