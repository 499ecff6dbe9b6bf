"""README and docs say what is there: commands compose, links lead somewhere, code runs."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from torch import nn

import eval as eval_program
import qat
import train
from qat.model.spec import ModelSpec
from qat.settings import machine
from qat.settings.command_line import Program, main
from qat.settings.schema import DataSettings, EvalTaskSettings, TrainSettings
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = "add_a_"  # pages that name files and options which their reader is to write
CONF = ROOT / "conf"


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _lines_of_shell(text: str) -> list[str]:
    return [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
            for line in block.splitlines()]  # fmt: skip


def _commands(line: str) -> list[tuple[str, str]]:
    """(train or eval, its arguments) of a line of shell; not of ``resume=RUN``, which takes a run
    that was begun (tests/runs/test_resume.py)."""
    line = re.sub(r"\s+#.*", "", line)
    patterns = {
        r"\.venv/bin/python (train|eval)\.py (.*)": lambda m: (m[1], m[2]),
        r"launch/node\.sh \d+ (.*)": lambda m: ("train", m[1]),
        r"sbatch .*launch/slurm\.sbatch \w+ (.*)": lambda m: ("train", m[1]),
    }
    found = [(re.fullmatch(pattern, line), told) for pattern, told in patterns.items()]
    return [told(match) for match, told in found if match and not match[0].endswith("resume=RUN")]


COMMANDS = list(
    dict.fromkeys(
        command
        for path in PAGES
        if not path.name.startswith(GUIDES)
        for line in _lines_of_shell(path.read_text())
        for command in _commands(line)
    )
)


def _param(name: str, line: str):
    """The jobs of a sweep are composed one by one; a help lists each file of settings."""
    marks = [pytest.mark.slow] if line.startswith(("-m ", "--help")) else []
    return pytest.param(name, line, marks=marks, id=f"{name} {line}")


def test_there_are_commands() -> None:
    assert len([name for name, _ in COMMANDS if name == "train"]) >= 12
    assert len([name for name, _ in COMMANDS if name == "eval"]) >= 12


@pytest.mark.parametrize("profile", ["laptop", pytest.param("golf", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "line"), [_param(*command) for command in COMMANDS if "profile=" not in command[1]]
)
def test_command_without_a_profile(
    name: str, line: str, profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if this machine were the one or the other."""
    monkeypatch.setattr(machine, "detect_profile", lambda: (profile, "asked for by the test"))
    _check_command(name, line, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("name", "line"), [_param(*command) for command in COMMANDS if "profile=" in command[1]]
)
def test_command(name: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _check_command(name, line, monkeypatch, tmp_path)


def _check_command(name: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("RUN", "bits", "llama"):
        (tmp_path / "logs/runs" / folder).mkdir(parents=True)
    if "init_from=RUN" in line:  # its sizes and its data are asked for
        spec, data = ModelSpec(1024, 4, 288, 6, 3, 2, True), DataSettings(source="web_bible")
        of_run = yaml.safe_dump({"model": vars(spec), "data": vars(data)})
        (tmp_path / "logs/runs/RUN/config.yaml").write_text(of_run)
    words = shlex.split(line)
    launchers = [word for word in words if word.startswith("hydra/launcher=")]
    for launcher in launchers:  # its presence is checked, SLURM is not here
        assert (CONF / f"{launcher.replace('=', '/')}.yaml").is_file()
    of_launcher = (*launchers, "hydra.launcher.")
    arguments = [word for word in words if not word.startswith(of_launcher)]
    if "-m" in words and not any(word.startswith("seed=") for word in words):
        arguments.append("seed=1")  # of five that differ in it alone
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    seen = []
    resolve = (train if name == "train" else eval_program).resolve
    program = Program(
        name, resolve, lambda settings, job: seen.append(settings) or 0, after_sweep=lambda _: 0
    )
    try:
        code = main(program)
    except SystemExit as left:  # Hydra's way out of --help
        code = int(left.code or 0)
    assert code == 0
    is_question = any(word.startswith("-") and word != "-m" for word in words)  # starts nothing
    assert bool(seen) != is_question


@pytest.mark.parametrize("path", PAGES, ids=_named)
def test_other_commands_are_there(path: Path) -> None:
    """Programs and targets of make in shell blocks."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in _lines_of_shell(path.read_text()):
        if made := re.match(r"make ([\w-]+)", line):
            assert made[1] in targets, line
        for program in re.findall(r"\b(?:benchmarks|launch)/[\w.]+", line):
            assert (ROOT / program).is_file(), line


@pytest.mark.parametrize("path", PAGES, ids=_named)
def test_links_and_pictures_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).resolve().exists(), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w.]+)\)", README.read_text()))
    assert {path.name for path in PAGES[1:]} <= linked


@pytest.mark.parametrize("path", PAGES, ids=_named)
def test_named_files_are_there(path: Path) -> None:
    if path.name.startswith(GUIDES):
        return
    named = re.findall(
        r"(?<![\w/.])(?:qat|conf|tests|benchmarks|launch|docs)/[a-z0-9_./]*[a-z0-9_/]",
        path.read_text(),
    )
    for name in named:
        assert (ROOT / name).exists(), name


def _settings(schema: type, prefix: str = "") -> set[str]:
    names: set[str] = set()
    types = get_type_hints(schema)
    for field in fields(schema):
        names.add(prefix + field.name)
        inner = types[field.name]
        if is_dataclass(inner):
            assert isinstance(inner, type)
            names |= _settings(inner, f"{prefix}{field.name}.")
    return names


def _is_option(group: str, option: str) -> bool:
    folders = ("qat", "grid") if group == "qat" else (group,)  # each grid is a qat= option
    return any((CONF / folder / f"{option}.yaml").is_file() for folder in folders)


@pytest.mark.parametrize("path", PAGES, ids=_named)
def test_named_settings_are_there(path: Path) -> None:
    """``setting=value`` and ``group=one | two`` in the text; commands are composed above."""
    if path.name.startswith(GUIDES) or path.name == "own_loop.md":  # arguments of Python there
        return
    known = _settings(TrainSettings) | _settings(EvalTaskSettings) | {"experiment", "arm"}
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        pairs = re.findall(r"(?<![\w.-])([a-z_]+(?:[./][a-z_]+)*)=((?:\w+ \| )*[\w.]+)?", span)
        for name, value in pairs:
            is_group = (CONF / name).is_dir()
            assert is_group or name in known, span
            for option in value.split(" | ") if is_group else []:
                by_name = re.fullmatch(r"[a-z0-9_]+", option) is not None
                skipped = (name, option) == ("profile", "auto")  # replaced before composition
                assert not by_name or skipped or _is_option(name, option), span


def test_the_readme_is_read_in_one_sitting() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("path", PAGES, ids=_named)
def test_captions_say_what_mbpb_is(path: Path) -> None:
    for caption, table in re.findall(r"((?:^[^|\n].*\n)+)\n((?:^\|.*\n)+)", path.read_text(), re.M):
        if "mbpb" in caption + table:
            assert "thousandths of a bit per byte" in " ".join(caption.split()), caption


def _programs() -> list:
    """Blocks of Python under one heading are one program."""
    found = []
    for path in PAGES:
        for section in re.split(r"^## ", path.read_text(), flags=re.M):
            blocks = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
            code = "\n".join(blocks)
            if "QatModel" in code:
                title = section.partition("\n")[0]
                marks = [pytest.mark.slow] if path.stem == "cabinet" else []
                found.append(pytest.param(code, marks=marks, id=f"{_named(path)}, {title}"))
    return found


class _Reader(nn.Module):
    """The ``model`` of README's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU())})
        self.blocks = nn.ModuleList([block])
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block["mlp"](x)
        return self.lm_head(x)


@pytest.mark.skipif(not hasattr(qat, "QatModel"), reason="qat has no public API yet")
@pytest.mark.parametrize("code", _programs())
def test_code_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """README's ten lines are given a model and batches; the programs of docs bring their own."""
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)  # they write files
    torch.manual_seed(0)
    ids = torch.randint(16, (10, 2, 4))
    names = {
        "torch": torch, "F": nn.functional, "model": _Reader(),
        "batches": list(zip(ids, ids.roll(-1, -1), strict=True)),
    }  # fmt: skip
    exec(compile(code, "README and docs", "exec"), names)
    assert list(tmp_path.glob("*.qat"))
