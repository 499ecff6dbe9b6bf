"""Where a result comes from: code, versions, machine, command.

Files that are used again are told by ``storing_code``, a hash of the modules that turn weights into
a file and score it. Not by the commit, which every typo changes: of these modules statements count,
comments and docstrings do not. Another version of Python may give the same code another hash.
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
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STORING = (  # rooms and files; all of them are in train_gpt.py too
    "quantize", "model", "artifact", "ptq", "budget", "runs/storing.py", "training/checkpoint.py",
    "evaluation/score.py", "evaluation/windows.py",
)  # fmt: skip
CABINETS_METHODS = ("hqq", "lqer", "smoothquant")  # of ptq; no file of a run is made by them
THEN = ", then "
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


def in_turn(values: Iterable[str]) -> str:
    """``a, then b``: what made a run, each that is another than the one before it."""
    return THEN.join(value for value, _ in groupby(values))


def short(commits: str) -> str:
    """Commits as ``in_turn`` names them, as people do."""
    parts = commits.split(THEN)
    return THEN.join(part[:9] + "-dirty" * part.endswith("-dirty") for part in parts)


def dirty_diff() -> str:
    return _git("diff", "HEAD") or ""


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
def storing_code(*more: str) -> str:
    """The same in the repository and in an unpacked ``train_gpt.py``. ``more``: rooms and files
    that count too."""
    return hash_of_code((*STORING, *more))


def hash_of_code(parts: Iterable[str]) -> str:
    """Of what files, and those of rooms, do, without the methods that only the cabinet has."""
    paths = [ROOT / "qat" / part for part in parts]
    files = [
        f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*.py")))
    ]
    return hash_of_statements([f for f in files if f.stem not in CABINETS_METHODS], ROOT)


def hardware(world_size: int) -> str:
    """Ranks and processors, such as ``8x NVIDIA H100`` or ``AMD EPYC, 2 threads``."""
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
