"""Where a result comes from: code, versions, machine, command.

Files that are used again are told by ``storing_code``, a hash of the modules that turn weights into
a file. Not by the commit, which every typo changes: of these modules statements count, comments and
docstrings do not. Another version of Python may give the same code another hash.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STORING_ROOMS = ("quantize", "model", "artifact", "ptq", "budget")
PACKAGES = ("torch", "lightning", "hydra-core", "torchao", "numpy", "sentencepiece", "zstandard")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project, None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace")


def commit() -> str:
    """Commit hash, with ``-dirty`` if the tree differs from it, or ``unknown`` outside git."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head.strip() + ("-dirty" if _git("status", "--porcelain") else "")


def dirty_diff() -> str:
    return _git("diff", "HEAD") or ""


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


def files_reached(modules: Iterable[str]) -> list[Path]:
    """Project files that ``modules`` import, directly or not, and their own, sorted."""
    found: set[Path] = set()
    waiting = [file for module in modules for file in _module_files(module)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [f for module in _imported_modules(file) for f in _module_files(module)]
    return sorted(found)


def hash_of_statements(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of what the files do and where below ``root`` they are."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and ast.get_docstring(node, clean=False) is not None
            ):
                del node.body[0]
        digest.update(f"{file.relative_to(root).as_posix()}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


@cache
def storing_code(*more_rooms: str) -> str:
    """The same in the repository and in an unpacked ``train_gpt.py``. ``more_rooms``: whose files
    count too, all of them."""
    reached = files_reached(("qat.runs.storing",))
    files = [file for file in reached if file.relative_to(ROOT).parts[1] in STORING_ROOMS]
    for room in more_rooms:
        files += sorted((ROOT / "qat" / room).rglob("*.py"))
    return hash_of_statements(files, ROOT)


def hardware(world_size: int) -> str:
    """Ranks and processors, such as ``8x NVIDIA H100`` or ``AMD EPYC, 2 cores``."""
    if torch.cuda.is_available():
        return f"{world_size}x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), name)
    ranks = f", {world_size} ranks" if world_size > 1 else ""
    return f"{name}, {torch.get_num_threads()} threads{ranks}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def collect(world_size: int) -> dict[str, Any]:
    return {
        "commit": commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "hardware": hardware(world_size),
    }
