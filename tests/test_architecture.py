"""The arrows of the house, enforced: imports go one way, and rooms import only what is theirs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# room -> rooms it may import; ``settings.schema`` (plain dataclasses) is open to all but the lowest
ARROWS = {
    "quantize": set(),
    "language": set(),
    "artifact": {"quantize"},
    "training": {"quantize", "language", "artifact"},
    "evaluation": {"quantize", "language", "artifact"},
    "cabinet": {"quantize", "language", "artifact", "evaluation"},
    "study": {"quantize", "language", "artifact", "training", "evaluation", "cabinet"},
    "settings": set(),
}
ONLY = {  # third-party package -> rooms that may import it
    "omegaconf": {"settings"},
    "hydra": {"settings"},
    "lightning": {"training", "study"},
    "wandb": {"study"},
    "jinja2": {"study"},
    "wandb_workspaces": {"study"},
    "sentencepiece": {"language"},
    "zstandard": {"artifact"},
    "constriction": {"artifact"},
    "huggingface_hub": {"language"},
    "scipy": {"evaluation", "study"},
    "torchao": {"cabinet"},
    "bitsandbytes": {"cabinet"},
    "gguf": {"cabinet"},
}


def files() -> list[Path]:
    return sorted((ROOT / "qat").rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "qat").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    if room(path) not in ARROWS:
        assert room(path) in ("errors", "__init__")
        assert not {name for name in imports(path) if name.startswith("qat")}
        return
    allowed = ARROWS[room(path)] | {room(path), "errors"}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "qat":
            open_to_all = (
                "",
                ".schema",
                ".command_line",
                ".checks",
                ".options",
                ".ranges",
                ".replay",
            )
            is_schema = name in [f"qat.settings{end}" for end in open_to_all]
            typed = room(path) in ("training", "evaluation", "cabinet", "study", "language")
            assert parts[1] in allowed or (is_schema and typed), f"{path} imports {name}"
        elif parts[0] in ONLY:
            assert room(path) in ONLY[parts[0]], f"{path} imports {name}"


def test_quantize_imports_torch_alone() -> None:
    standard = {
        "__future__",
        "collections",
        "dataclasses",
        "fnmatch",
        "hashlib",
        "json",
        "math",
        "zlib",
    }
    for path in (ROOT / "qat" / "quantize").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"qat", "torch"}
        kernels = {"triton"} if path.name == "triton_kernels.py" else set()
        assert outside <= standard | {"typing"} | kernels, path
    lazily = [p for p in files() if "qat.quantize.triton_kernels" in p.read_text()]
    assert [p.name for p in lazily] == ["fused.py"]  # inside a function, on CUDA only


def test_weights_are_rounded_in_one_place_only() -> None:
    """Promise 1: ``round`` on tensors exists in rounding.py and nowhere else."""
    for path in files():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("round", "round_", "fake_quantize_per_tensor_affine")
        ]
        assert not calls or path.name == "rounding.py", path


def test_files_are_short_enough_to_read() -> None:
    for path in [*files(), ROOT / "train.py", ROOT / "eval.py"]:
        assert len(path.read_text().splitlines()) <= 300, path
