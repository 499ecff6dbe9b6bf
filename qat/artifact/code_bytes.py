"""The code bytes counted against the limit: every .py file that scoring an artifact imports.

Found by following import statements from ``eval.py`` and the modules of the score task, so the
number does not depend on what happens to be loaded in the process that asks.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRY_MODULES = ("eval", "qat.evaluation.score_task")


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
    return sorted(found)


def count_code_bytes(more_modules: tuple[str, ...] = ()) -> int:
    """Bytes of the files, and of those that ``more_modules`` add."""
    return sum(file.stat().st_size for file in code_files(ENTRY_MODULES + more_modules))
