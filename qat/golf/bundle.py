"""The code of a run as one file that runs, ``train_gpt.py``; its size is what the limit counts.

A readable head (``bundle_head.py``), the run's settings in a slot of fixed length, and packed: the
two programs, ``conf/``, and every module that training a model and scoring its artifact import.
These are found by following import statements, so neither file nor size depends on what happens to
be loaded, and the slot keeps the size the same for all runs: it is known before training. From its
unpacked folder the file makes itself again.
"""

from __future__ import annotations

import ast
import base64
import json
import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from qat.errors import UserError
from qat.model.spec import architectures

ROOT = Path(__file__).resolve().parents[2]
HEAD = Path(__file__).with_name("bundle_head.py")
NAME = "train_gpt.py"
# Programs, and what they import by name: the task of eval.py, architectures (all of them, so that
# the size is the same for all runs), and what Hydra does.
ENTRY_MODULES = (
    "train", "eval", "qat.evaluation.score_task", "hydra_plugins.qat_sweeper",
    *(f"qat.model.{n}" for n in architectures()),
)  # fmt: skip
SLOT_CHARS = 2_048  # for the run's settings, as a Python list padded with spaces
LINE_CHARS = 100
# The dictionary of preset 9 (64 MiB) would be memory for nothing; pb=0 is for text.
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20, "pb": 0}
]


def _module_files(module: str) -> list[Path]:
    """The files that importing ``module`` runs, packages' ``__init__.py`` included."""
    parts = module.split(".")
    files = []
    for depth in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:depth])
        files += [
            path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()
        ]
    return files


def _imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "qat"}


def code_files(modules: tuple[str, ...] = ENTRY_MODULES) -> list[Path]:
    """Project files reached from ``modules``, sorted."""
    found: set[Path] = set()
    waiting = [file for module in modules for file in _module_files(module)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [f for module in _imported_modules(file) for f in _module_files(module)]
            is_package = file.name == "__init__.py"
            if is_package and b"iter_modules" in file.read_bytes():  # it imports what lies beside
                waiting += file.parent.glob("*.py")
    return sorted(found)


@cache
def _packed(more_modules: tuple[str, ...]) -> str:
    files = [*code_files(ENTRY_MODULES + more_modules), HEAD, *(ROOT / "conf").rglob("*.yaml")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}
    raw = json.dumps(dict(sorted(sources.items())), ensure_ascii=False).encode()
    coded = lzma.compress(raw, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)
    text = base64.b85encode(coded).decode()
    return "\n".join(text[i : i + LINE_CHARS] for i in range(0, len(text), LINE_CHARS))


def _slot(overrides: Sequence[str]) -> str:
    """The list as Python spells it, in ASCII, so that characters are bytes."""
    literal = ascii(list(overrides))
    if len(literal) > SLOT_CHARS:
        raise UserError(
            f"the run's settings take {len(literal)} characters and {NAME} has {SLOT_CHARS} for "
            "them; shorten them (a glob for many files) or put them into conf/experiment/NAME.yaml"
        )
    return literal[:-1] + " " * (SLOT_CHARS - len(literal)) + "]"


def bundle(overrides: Sequence[str], more_modules: tuple[str, ...] = ()) -> bytes:
    """``train_gpt.py`` that trains with these overrides. UserError if they are too long.

    Its length depends on the project's files and ``more_modules`` alone.
    """
    text = HEAD.read_text("utf-8")
    for empty, filled in (
        ("\nOVERRIDES: list[str] = []\n", f"\nOVERRIDES: list[str] = {_slot(overrides)}\n"),
        ('\nPACKED = ""\n', f'\nPACKED = """\n{_packed(more_modules)}\n"""\n'),
    ):
        assert text.count(empty) == 1
        text = text.replace(empty, filled)
    return text.encode()


@cache
def count_code_bytes(more_modules: tuple[str, ...] = ()) -> int:
    """Bytes of ``train_gpt.py``; more with modules that a .qat does not need."""
    return len(bundle((), more_modules))
