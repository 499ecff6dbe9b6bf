"""The map of the house, printed with ``-s``: one-way arrows, no circle, no room too large."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up: a room imports only what stands before it here.
FLOORS = (
    ("errors", "compiled"),
    ("quantize", "text", "model"),
    ("artifact",),
    ("ptq",),
    ("budget", "qat_model"),
    ("training", "evaluation"),
    ("runs",),
    ("analysis", "golf"),
    ("cabinet", "export"),
    ("study",),
    ("report",),
)
SETTINGS = "settings"  # plain dataclasses and checks: open to the rooms that are told what to do
NOT_TOLD = ("errors", "quantize", "model", "artifact", "ptq")
LARGEST_SHARE = 1 / 6  # of the lines, for one room
ONLY = {  # third-party package -> rooms that may import it
    "omegaconf": {"settings"},
    "hydra": {"settings"},
    "lightning": {"training", "runs"},
    "wandb": {"runs", "report"},
    "wandb_workspaces": {"report"},
    "jinja2": {"report"},
    "sentencepiece": {"text"},
    "huggingface_hub": {"text"},
    "pyarrow": {"text"},
    "zstandard": {"artifact"},
    "brotli": {"artifact"},
    "constriction": {"artifact"},
    "scipy": {"analysis", "study"},
    "torchmetrics": {"analysis"},
    "transformers": {"cabinet"},
    "torchao": {"cabinet"},
    "bitsandbytes": {"cabinet"},
    "gguf": {"export"},
    "safetensors": {"training", "export"},
}
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def files() -> list[Path]:
    return sorted((ROOT / "qat").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def statements(path: Path, names_of_types: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, those inside functions too; without ``names_of_types`` not those that
    only a type checker runs."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not names_of_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped:
            yield node


def imports(path: Path, names_of_types: bool = True) -> set[str]:
    """Modules that a file imports; of this project the file that is meant."""
    modules = {module_of(p) for p in files()}
    found = set()
    for node in statements(path, names_of_types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else str(node.module))
    return found


def project_imports() -> dict[str, set[str]]:
    """Module -> modules of this project that it imports."""
    return {
        module_of(path): {name for name in imports(path) if name.split(".")[0] == "qat"}
        for path in files()
    }


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, [] if there is none."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*way, node]):
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        if found := visit(start, []):
            return found
    return []


def lines_by_room() -> dict[str, int]:
    lines: dict[str, int] = {}
    for path in files():
        room = room_of(module_of(path))
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    return lines


def test_every_room_has_its_floor() -> None:
    assert set(lines_by_room()) - {"", SETTINGS} == set(FLOOR_OF)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    room = room_of(module)
    for name in imports(path):
        if name.split(".")[0] != "qat":
            assert room in ONLY.get(name.split(".")[0], {room}), f"{path} imports {name}"
            continue
        other = room_of(name)
        if other in (room, "errors", ""):
            continue
        if other == SETTINGS:
            assert room not in NOT_TOLD, f"{path} imports {name}"
        elif room == SETTINGS:
            assert other in ("quantize", "model"), f"{path} imports {name}"
        elif room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path} imports {name}"


def test_no_circle_anywhere() -> None:
    graph = project_imports()
    rooms: dict[str, set[str]] = {}
    for module, names in graph.items():
        rooms.setdefault(room_of(module), set()).update(
            room_of(name) for name in names if room_of(name) != room_of(module)
        )
    rooms.pop("", None)
    assert circle_in(graph) == []
    assert circle_in({room: others - {""} for room, others in rooms.items()}) == []


def test_a_circle_would_be_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_room_is_too_large() -> None:
    """Prints the map: each room, its lines, and the rooms that it imports."""
    lines = lines_by_room()
    total = sum(lines.values())
    graph = project_imports()
    print(f"\n{total:,} lines in {len(files())} files")
    for room in (*FLOOR_OF, SETTINGS):
        below = {room_of(n) for m, names in graph.items() if room_of(m) == room for n in names}
        shown = ", ".join(sorted(below - {room, "errors", ""}))
        print(f"{room:11} {lines[room]:6,} {lines[room] / total:6.1%}  imports {shown}")
    assert {room for room, count in lines.items() if count > LARGEST_SHARE * total} == set()


def test_a_class_name_occurs_once() -> None:
    """And none is that of a class of rich that the house shows tables with."""
    where: dict[str, list[str]] = {"Table": ["rich"], "Console": ["rich"]}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_quantize_imports_torch_alone() -> None:
    standard = {
        "__future__", "collections", "dataclasses", "fnmatch", "functools", "hashlib", "importlib",
        "itertools", "json", "math", "pkgutil", "struct", "zlib",
    }  # fmt: skip
    for path in (ROOT / "qat" / "quantize").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"qat", "torch"}
        kernels = {"triton"} if path.name == "triton_kernels.py" else set()
        assert outside <= standard | {"typing"} | kernels, path
    lazily = [p for p in files() if "qat.quantize.triton_kernels" in p.read_text()]
    assert [p.name for p in lazily] == ["fused.py"]  # inside a function, on CUDA only


ROUNDING = ("round", "round_", "fake_quantize_per_tensor_affine", "bucketize")


def methods_called(path: Path) -> set[str]:
    calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    return {function.attr for function in calls if isinstance(function, ast.Attribute)}


def test_weights_are_rounded_in_one_place_only() -> None:
    """Promise 1: ``round`` on tensors exists in rounding.py and in the number formats, and these
    are asked by rounding.py alone."""
    quantize = ROOT / "qat" / "quantize"
    for path in files():
        is_format = path.parent == quantize / "levels"
        called = methods_called(path)
        assert not called & set(ROUNDING) or is_format or path == quantize / "rounding.py", path
        asks = [node for node in ast.walk(ast.parse(path.read_text())) if _is_asked(node)]
        assert not asks or path == quantize / "rounding.py", path


def _is_asked(node: ast.AST) -> bool:
    """``grid.table.nearest(x)``"""
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith("table.nearest")


def test_settings_and_grids_load_without_torch() -> None:
    """Help, completion and a rejected typo answer at once."""
    line = (
        "import sys, qat, qat.settings.checks; from qat.quantize.grid import Grid; "
        "from qat.quantize.levels import all_levels; Grid(bits=4); all_levels(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT).returncode == 0
