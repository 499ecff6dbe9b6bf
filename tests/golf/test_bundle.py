"""The counted code is one file that holds all it needs, and always the same number of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.golf import bundle_head
from qat.golf.bundle import ROOT, SLOT_CHARS, bundle, code_files, count_code_bytes
from tests.conftest import first_on_path

OVERRIDES = ["profile=laptop", "data.files=['/a b/it\\'s \u00e9\U0001f600.txt']", "seed=7"]
MAKE_IT_AGAIN = """
import sys
from pathlib import Path
from qat.golf.bundle import ROOT, bundle, count_code_bytes
assert ROOT == Path.cwd(), ROOT
data = bundle(eval(sys.argv[1]))
assert len(data) == count_code_bytes()
sys.stdout.buffer.write(data)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "train_gpt.py"
    path.write_bytes(bundle(OVERRIDES))
    return path


def call(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it where the project is not: another package of its name comes first instead."""
    other = file.parent / "other"
    for name in ("qat/__init__.py", "train.py", "eval.py"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("raise ImportError('not what the file holds')\n")
    return subprocess.run(
        [sys.executable, str(file), *arguments], cwd=file.parent, capture_output=True, text=True,
        env=os.environ | first_on_path(other),
    )  # fmt: skip


def test_its_size_is_the_count_whatever_the_settings(file: Path) -> None:
    assert file.stat().st_size == count_code_bytes()
    longest = "x" * (SLOT_CHARS - len("['']"))
    for overrides in ([], ["seed=1"], [longest], ["\u00e9" * 100]):
        assert len(bundle(overrides)) == count_code_bytes()
    with pytest.raises(UserError, match=r"the run's settings take 2049 characters .* has 2048"):
        bundle([longest + "x"])


def test_files_that_are_found_by_looking_are_in_it() -> None:
    for folder in ("levels", "gradients"):
        files = set((ROOT / "qat/quantize" / folder).glob("*.py"))
        assert len(files) > 5
        assert files <= set(code_files())


@pytest.mark.slow
def test_unpacked_it_is_the_project_and_makes_itself_again(file: Path) -> None:
    done = call(file, "--unpack", "sources")
    assert done.returncode == 0, done.stderr
    folder = file.parent / "sources"
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for path in written:
        assert (folder / path).read_bytes() == (ROOT / path).read_bytes()
    assert written >= {path.relative_to(ROOT) for path in code_files()}
    assert written >= {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    again = subprocess.run(
        [sys.executable, "-c", MAKE_IT_AGAIN, repr(OVERRIDES)], cwd=folder, capture_output=True,
        env=os.environ | first_on_path(folder) | {"PYTHONHASHSEED": "3"},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout == file.read_bytes()

    for arguments, message in (
        (["--unpack", "sources"], "--unpack sources: there are files in it already"),
        (["--unpack"], "--unpack: give one folder"),
        (["--unpack", "train_gpt.py"], "--unpack train_gpt.py: Not a directory"),
    ):
        done = call(file, *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


@pytest.mark.slow
def test_what_is_typed_wins_and_nothing_is_left(file: Path, tmp_path: Path) -> None:
    before = set(file.parent.iterdir()) | {file.parent / "other"}
    os.environ["TMPDIR"], kept = str(tmp_path), os.environ.get("TMPDIR")
    try:
        done = call(file, "seed=8", "data.files=null", "grid=int6", "--cfg=job")
        mistake = call(file, "seeed=8")
        elsewhere = call(file, "artifact=a.qat", "task=sample")
    finally:
        os.environ.pop("TMPDIR")
        if kept is not None:
            os.environ["TMPDIR"] = kept
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"profile: laptop", "seed: 8", "  bits: 6", "  files: null"} <= set(lines)
    assert (mistake.returncode, len(mistake.stderr.splitlines())) == (2, 1)
    assert elsewhere.returncode == 2
    assert elsewhere.stderr.startswith("error: task=sample artifact=a.qat: train_gpt.py scores")
    assert set(file.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_which_program_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_head, "OVERRIDES", ["profile=golf", "++seed=1", "qat=int6"])
    for typed, expected in (
        ([], ("train", ["profile=golf", "++seed=1", "qat=int6"])),
        (["seed=2", "-m"], ("train", ["profile=golf", "qat=int6", "seed=2", "-m"])),
        (["+qat=int4"], ("train", ["profile=golf", "++seed=1", "+qat=int4"])),
        (["qat.start_step=3"], ("train", ["profile=golf", "++seed=1", "qat=int6",
                                          "qat.start_step=3"])),
        (["resume=r"], ("train", ["resume=r"])),
        (["artifact=a", "seed=2"], ("eval", ["artifact=a", "seed=2"])),
    ):  # fmt: skip
        assert bundle_head.command(typed) == expected
