"""Shared ways to run the two programs, on a corpus small enough for seconds.

The whole suite runs in a worker per core (``-n auto``), each with one thread.
What takes seconds to make is made by the worker that needs it first and read by all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
GOLF = Path(__file__).parent / "data" / "golf"
# A model and a clock of seconds; every run of the tests that does not say otherwise.
TINY = (
    "profile=laptop", "model.num_layers=2", "model.dim=64", "model.num_heads=4",
    "model.num_kv_heads=2", "model.vocab_size=320", "seq_len=32", "batch_tokens=256",
    "micro_batch_tokens=256", "budget_seconds=null", "max_steps=12", "schedule.warmdown_steps=4",
    "schedule.warmup_steps=1", "eval.batch_tokens=2048", "precision=fp32",
)  # fmt: skip

# Where somebody has switched compilation off for all of torch, nothing can be counted.
compiles = pytest.mark.skipif(
    os.environ.get("TORCHDYNAMO_DISABLE") == "1", reason="TORCHDYNAMO_DISABLE=1 compiles nothing"
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it comes with the CUDA builds of torch",
)


def run_with_triton(module: str, check: str) -> None:
    """Call ``check()`` of a module in a fresh process: on the GPU if there is one, else in Triton's
    interpreter, which must be asked for before Triton is imported."""
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {check}; {check}()"],
        cwd=ROOT, env=os.environ | interpret, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Read when torch is first imported, which is later than this, and by every process started here.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes, each importing torch
MOST_WORKERS = 4  # each takes a gigabyte of memory and imports torch for itself

# A busy machine is no reason to fail: no deadlines. `make test-slow` asks for the thorough one.
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """No test sees a GPU but those of ``-m cuda``, in a run of their own: torch asks once."""
    if not config.option.markexpr.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core; none for files named one by one, so that what they print is seen."""
    if any(Path(name.partition("::")[0]).is_file() for name in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MOST_WORKERS) if cores and cores > 1 else 0


@dataclass(frozen=True)
class Done:
    """Exit code and output of one call of a program."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _composed_once() -> Iterator[None]:
    """Hydra composes once to see whether a file sets ``hydra.mode``, and then for the run: a fifth
    of a tiny one. No file of ``conf/`` does."""
    from hydra._internal.hydra import Hydra

    asked = Hydra.get_mode

    def mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        may_say = any(word.startswith(("hydra.mode", "--config-dir")) for word in sys.argv)
        return asked(hydra, config_name, overrides) if may_say else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", mode)
        yield


def _call(script: str, arguments: list[str]) -> Done:
    """Run train.py or eval.py in this process, as its ``__main__`` would."""
    import eval as eval_program
    import train as train_program
    from qat.settings.command_line import main

    programs = {"train.py": train_program.PROGRAM, "eval.py": eval_program.PROGRAM}
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(ROOT / script), *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(programs[script])
            except SystemExit as done:  # of argparse, after --help and --version
                code = int(done.code or 0)
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def first_on_path(folder: Path) -> dict[str, str]:
    """For the environment of another process; packages may lie on this one's path too."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """(a folder of all workers, True for the one that has to fill it); the others wait."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield folder, not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 kB of sentences made from a few words, as one .txt file."""
    words = "the a light dark water day night saw made called and of in over earth sea sky was good"
    chooser = random.Random(1)
    lines = []
    for _ in range(6000):
        count = chooser.randint(5, 12)
        lines.append(" ".join(chooser.choice(words.split()) for _ in range(count)) + ".\n")
        if chooser.random() < 0.1:
            lines.append("\n")
    with shared_folder(tmp_path_factory, "corpus") as (folder, is_first):
        path = folder / "words.txt"
        if is_first:
            path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and shards of all tests; the program itself locks what it makes there."""
    with shared_folder(tmp_path_factory, "cache") as (folder, _):
        return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache_dir: Path) -> list[str]:
    """Overrides of a tiny run on the tiny corpus."""
    return [*TINY, f"data.files=[{corpus}]", f"data.cache_dir={cache_dir}"]


@pytest.fixture
def train(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """train(*overrides): a tiny run in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: _call("train.py", [*tiny, *overrides])


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """program(script, *arguments): exactly these arguments, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return lambda script, *arguments: _call(script, list(arguments))


@pytest.fixture(scope="session")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished int6 run, shared and only read."""
    with shared_folder(tmp_path_factory, "finished") as (parent, is_first):
        if is_first:
            with contextlib.chdir(parent):
                done = _call("train.py", [*tiny, "qat=int6", "qat.start_step=5", "run_name=shared"])
            assert done.code == 0, done.err
    return parent / "logs" / "runs" / "shared"


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """plug_in(package, its cached finder, name, code): as if NAME.py lay in that package."""
    finders = []

    def put(package: ModuleType, finder: Any, name: str, code: str) -> None:
        folder = tmp_path / "plugged"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        finders.append(finder)
        finder.cache_clear()

    yield put
    for finder in finders:
        finder.cache_clear()


def code_in(page: str) -> list[str]:
    """The blocks of code of a page in docs/, in their order."""
    return re.findall(r"```\w+\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture(scope="session")
def prepared_text(finished: Path, cache_dir: Path) -> Path:
    """The folder of shards and tokenizer of the tiny corpus, which ``finished`` read too."""
    from qat.artifact.container import read_artifact

    return cache_dir / read_artifact(finished / "artifact.qat").meta["data"]["cache_key"]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def _wandb_in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B kept to itself: nothing in the user's home, no login, no way out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        yield


@pytest.fixture
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "NETRC"):  # where a developer's own login may be
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
