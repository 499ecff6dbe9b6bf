"""Text is UTF-8 whatever the locale says: in files, on the console, in other programs' output."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from qat.runs import provenance, run_folder
from tests.conftest import ROOT

SOURCES = [
    ROOT / "train.py", ROOT / "eval.py",
    *(file for room in ("qat", "launch", "hydra_plugins") for file in (ROOT / room).rglob("*.py")),
]  # fmt: skip
# Name of a function -> place of the argument that says the encoding.
OPENERS = {"open": 3, "fdopen": 3, "read_text": 0, "write_text": 1, "FileHandler": 2,
           "TextIOWrapper": 1}  # fmt: skip


def openings(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the locale."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else name
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        mode = given.get("mode", ast.unparse(call.args[1]) if len(call.args) > 1 else "''")
        is_binary = name in ("open", "fdopen") and "b" in mode
        as_text = "True" in (given.get("text"), given.get("universal_newlines"))
        is_opener = name in OPENERS and not is_binary and len(call.args) <= OPENERS[name]
        if ast.unparse(call.func) == "os.open" or "encoding" in given:
            continue
        if as_text or is_opener:
            yield call


def test_encodings_are_said() -> None:
    for file in SOURCES:
        assert not [ast.unparse(call) for call in openings(ast.parse(file.read_bytes()))], file


def test_an_encoding_that_is_not_said_is_found() -> None:
    said = "open(a, 'rb'); p.read_text('utf-8'); p.write_text(t, encoding='utf-8'); run(c)"
    not_said = ("open(a)", "p.read_text()", "p.write_text(t)", "logging.FileHandler(f)",
                "open(a, 'w', newline='')", "subprocess.run(c, text=True)")  # fmt: skip
    assert not list(openings(ast.parse(said)))
    for call in not_said:
        assert list(openings(ast.parse(call))), call


def test_a_locale_of_ascii_alone(tmp_path: Path) -> None:
    """Letters come in, as settings and as names of files, and go out again."""
    (tmp_path / "é").mkdir()
    command = [sys.executable, str(ROOT / "train.py"), "--cfg=job", "--config-dir=é", "run_name=ü"]
    plain = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "run_name: ü\n" in done.stdout.decode()
    command[-1:] = [b"run_name=\xff"]
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: run_name=\\udcff: not a name in UTF-8")
    assert done.stderr.count(b"\n") == 1


def test_a_difference_of_any_letters_is_kept(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.txt").write_bytes(b"a\n")
    for asked in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *asked], check=True)
    (tmp_path / "a.txt").write_bytes("é\n".encode() + b"\xff\n")
    run_folder.describe(tmp_path, "é", ["é"], {}, 1)
    assert "+é\n+\N{REPLACEMENT CHARACTER}" in (tmp_path / "dirty.diff").read_text(encoding="utf-8")
