"""Every coder on the same codes of really trained weights.

    .venv/bin/python benchmarks/codecs.py logs/runs/RUN    # a finished run's checkpoint
    .venv/bin/python benchmarks/codecs.py --golf           # 9x512 random weights: speed and memory

The run's masters are put on each grid; codes only (scales and headers cost every coder the same).
``entropy`` is the order-0 entropy of all codes pooled. Each coder works in a process of its own:
``MB`` is its peak of resident memory above what was resident before: the most that both ways can
have taken. A small section is coded first, so that compiling is not timed. Table on stdout, JSON
in ``logs/codecs.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.artifact.coder import CODERS, GENERAL  # noqa: E402
from qat.artifact.sections import (  # noqa: E402
    Matrix,
    matrix_of,
)
from qat.evaluation.inspect_task import order0_bits  # noqa: E402
from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import build_plan  # noqa: E402
from qat.training.checkpoint import load_checkpoint  # noqa: E402

GRIDS = {
    "int8": Grid(bits=8),
    "int6": Grid(bits=6),
    "int6_sdclip": Grid(bits=6, scale_rule="sigma", sigma=12.85),
    "int4": Grid(bits=4),
    "ternary": Grid(levels="ternary", scale_rule="absmean", refit=True),
}


def golf_weights() -> dict[str, torch.Tensor]:
    """Gaussian, with scales of their own in rows and columns."""
    torch.manual_seed(0)
    shapes = GPT(ModelSpec(1024, 9, 512, 8, 4, 2, True)).state_dict()
    weights = {}
    for name, like in shapes.items():
        if name.endswith("weight"):
            rows, columns = like.shape
            scale = torch.exp(0.15 * torch.randn(rows, 1) + 0.25 * torch.randn(1, columns))
            weights[name] = torch.randn(rows, columns) * scale
    return weights


def codes_on(grid: Grid, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Matrix]]:
    plan = build_plan({n: tuple(w.shape) for n, w in weights.items()}, {"g": grid}, {"*": "g"})
    encoded = plan.encode(weights)
    codes = [item.coded.codes.flatten() for item in encoded if item.coded is not None]
    return torch.cat(codes), [matrix_of(item.entry) for item in encoded]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(coder: str, raw: bytes, matrices: list[Matrix]) -> dict[str, float]:
    chosen = CODERS[coder]
    small = [Matrix(8, 8, 7, False, "warm")]
    chosen.decode(chosen.encode(bytes(64), small), 64, small)  # imports and compiles
    before = resident_megabytes()
    started = time.perf_counter()
    coded = chosen.encode(raw, matrices)
    encoded = time.perf_counter()
    back = chosen.decode(coded, len(raw), matrices)
    decoded = time.perf_counter()
    assert back == raw
    return {
        "bytes": len(coded), "encode_seconds": encoded - started,
        "decode_seconds": decoded - encoded, "peak_megabytes": peak_megabytes() - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder")
    parser.add_argument("--golf", action="store_true")
    asked = parser.parse_args()
    if asked.golf == (asked.run is not None):
        parser.error("give a run's folder, or --golf")
    weights = golf_weights()
    if asked.run is not None:
        state = load_checkpoint(asked.run / "checkpoint.ckpt")
        if state is None:
            parser.error(f"{asked.run}: no readable checkpoint")
        weights = {n: w for n, w in state["weights"].items() if n.endswith("weight")}
    rows = []
    spawn = multiprocessing.get_context("spawn")
    print(f"{'grid':12} {'coder':7} {'bytes':>11} {'/ entropy':>10} {'/ best general':>15} "
          f"{'encode s':>9} {'decode s':>9} {'MB':>6}")  # fmt: skip
    for label, grid in GRIDS.items():
        codes, matrices = codes_on(grid, weights)
        raw = codes.numpy().tobytes()
        entropy = order0_bits(codes) * len(raw) / 8
        done = {}
        for coder in CODERS:
            with spawn.Pool(1) as pool:
                done[coder] = pool.apply(measure, (coder, raw, matrices))
        best = min(row["bytes"] for coder, row in done.items() if coder in GENERAL)
        for coder, row in done.items():
            print(f"{label:12} {coder:7} {row['bytes']:11,} {row['bytes'] / entropy:10.4f} "
                  f"{row['bytes'] / best:15.4f} {row['encode_seconds']:9.2f} "
                  f"{row['decode_seconds']:9.2f} {row['peak_megabytes']:6.0f}")  # fmt: skip
            about = {"grid": label, "coder": coder, "codes": len(raw), "entropy": entropy}
            rows.append(about | row)
    (ROOT / "logs" / "codecs.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
