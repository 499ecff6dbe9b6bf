"""Files that are used again are told by the code that made them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from qat.budget.budget import Budget
from qat.golf.bundle import bundle
from qat.runs import provenance
from qat.runs.provenance import hash_of_statements, storing_code
from qat.runs.result import Result
from qat.runs.store_again import export_again, export_code, storage_of
from qat.settings.schema import StoreSettings, StudySettings
from qat.study.prices import training_code
from tests.conftest import Done

CODE = '"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n'


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (CODE.replace("Doc", "Words"), True),
        (CODE.replace("# why", "# because"), True),
        (CODE.replace("\n    ret", "\n\n    ret"), True),
        (CODE.replace("+ 1", "+ 2"), False),
        (CODE.replace("f(x)", "g(x)"), False),
    ],
)
def test_statements_count_and_words_do_not(change: str, is_same: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(CODE)
    before = hash_of_statements([file], tmp_path)
    file.write_text(change)
    assert (hash_of_statements([file], tmp_path) == before) == is_same


def test_the_cabinet_counts_for_its_rows_alone() -> None:
    assert len({storing_code(), storing_code("cabinet")}) == 2


@pytest.fixture
def changed_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """changed_code(file): as if the project's code had another statement there."""
    package = tmp_path / "project" / "qat"
    shutil.copytree(provenance.ROOT / "qat", package)
    monkeypatch.setattr(provenance, "ROOT", package.parent)

    def change(file: str) -> None:
        with open(package / file, "a") as code:
            code.write("\nANOTHER = 1\n")
        storing_code.cache_clear()

    storing_code.cache_clear()
    yield change
    storing_code.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "stores", "trains"),
    [
        ("runs/storing.py", True, False),
        ("training/checkpoint.py", True, True),
        ("evaluation/score.py", True, False),
        ("evaluation/windows.py", True, False),
        ("qat_model.py", False, True),
        ("compiled.py", False, True),
        ("artifact/coder.py", True, False),
        ("report/page.py", False, False),
    ],
)
def test_what_counts_as_storing_and_as_training(
    file: str, stores: bool, trains: bool, changed_code: Callable[[str], None]
) -> None:
    before = storing_code(), training_code()
    changed_code(file)
    assert (storing_code() != before[0], training_code() != before[1]) == (stores, trains)


def test_what_stores_again_counts_for_exports(changed_code: Callable[[str], None]) -> None:
    before = storing_code(), export_code()
    changed_code("runs/store_again.py")
    assert (storing_code() != before[0], export_code() != before[1]) == (False, True)


@pytest.mark.slow
def test_an_unpacked_file_of_the_code_has_the_same_hash(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(bundle([]))
    subprocess.run(
        [sys.executable, "train_gpt.py", "--unpack", "sources"], cwd=tmp_path, check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", "from qat.runs.provenance import *; print(storing_code())"],
        cwd=tmp_path / "sources", env={"PYTHONPATH": "."}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == storing_code()


def test_a_file_of_other_code_is_made_again(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("run_name=a", "max_steps=1").code == 0
    folder = Path("logs/runs/a")
    result = Result.read(folder)
    assert result is not None
    assert result.storing_code == storing_code()
    target = storage_of(result.settings, StudySettings(grid="int6"), StoreSettings())
    budget = Budget(result.limit_bytes, result.code_bytes or 0)

    def export() -> tuple[dict, int]:
        row = export_again(folder, result, target, budget, Console(quiet=True))
        (file,) = folder.glob("exports/*.qat*")
        return row, file.stat().st_mtime_ns

    first = export()
    assert export() == first
    oversize = next(folder.glob("exports/*.qat"))
    oversize.rename(f"{oversize}.oversize")  # what the other code may have made of it
    monkeypatch.setattr("qat.runs.store_again.export_code", lambda: "another")
    row, written = export()
    assert row == first[0] | {"export_code": "another"}
    assert written > first[1]
    (known,) = folder.glob("exports/*.json")
    assert json.loads(known.read_text()) == row
