"""How cost grows with the weights, and with the text: seconds, peak memory and their slopes.

    .venv/bin/python benchmarks/growth.py             # tables on stdout, JSON in logs/growth.json
    .venv/bin/python benchmarks/growth.py --only file,gptq --sizes 2.6M,17M
    .venv/bin/python benchmarks/growth.py --only text

Models of random weights at four sizes, each (part, size) in a process of its own. *Peak* is memory
beyond what the process held before the operation (the weights it was given, say), also as a
multiple of the float32 weights; on CUDA the multiple is the GPU's peak. *Slope* is d log(cost) /
d log(weights) from the size before; where most of a cost is fixed it says nothing and is left out.
A part that would take longer than ``--limit-seconds`` at a size, by its slopes so far, is not run
and said so. Last come the goals that are missed: seconds with a slope above 1.05 (but GPTQ's, which
is cubic in the width), a peak above 3 times the float32 weights.

The solver's candidates have 2 of their 26 sizes here: all of them take 11 times as long.
Sensitivities and hessians come from few tokens, as one of them costs what it costs in training.
CPU seconds are those of all threads; on a machine that is not idle with OMP_NUM_THREADS=1 they
grow as seconds on an idle one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.artifact.container import pack, read_artifact, write_whole  # noqa: E402
from qat.budget import candidates  # noqa: E402
from qat.budget.budget import Budget  # noqa: E402
from qat.budget.fill import BudgetSolver, TrainedModel  # noqa: E402
from qat.model.registry import model_of, tensor_shapes  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.ptq.calibration import read_inputs  # noqa: E402
from qat.ptq.methods import encoded_by, gptq  # noqa: E402
from qat.quantize.fused import FusedSnap  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import Plan, build_plan  # noqa: E402
from qat.settings import machine  # noqa: E402
from qat.settings.schema import OptimizerSettings  # noqa: E402
from qat.text import corpus  # noqa: E402
from qat.text.source import write_shards  # noqa: E402
from qat.text.tokenizer import train_tokenizer  # noqa: E402
from qat.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from qat.training.optimizers import (  # noqa: E402
    build_optimizers,
    load_states,
    states_by_name,
)

SIZES = {
    "2.6M": ModelSpec(1024, 4, 288, 6, 3, 2),
    "17M": ModelSpec(1024, 9, 512, 8, 4, 2),
    "124M": ModelSpec(50257, 12, 768, 12, 12, 4),
    "350M": ModelSpec(50257, 24, 1024, 16, 16, 4),
}
GRID = Grid(bits=6)
RULES = {"*.weight": "grid", "*": "fp32"}
CODER = "mix"
BITS_PER_WEIGHT = 4.0  # of the solver's limit
CALIBRATION = (128, 16)  # sequences, tokens each
SENSITIVITY = (2, 64)  # batches of one sequence, tokens each
SOLVER_SIZES = candidates.SIZES[::13]
# Shorter operations are run again, for half a second
LONG_SECONDS, REPEAT_SECONDS = 5.0, 0.5
FIXED_SECONDS, FIXED_BYTES = 0.02, 20_000_000
LIBRARIES_BYTES = 400_000_000  # below it libraries and the coders' tables may be most of a peak
MOST_SLOPE, MOST_PEAK = 1.05, 3.0
GIVEN_BACK_BYTES = 1 << 17  # what is larger goes back to the system at once
CUBIC = ("gptq, codes",)
START_SECONDS = 60  # of a process: imports, random weights, what it warms up
TEXT = "text"
TEXTS = (20, 80, 200)  # MB

Row = dict[str, Any]


class Meter:
    """Rows of one process: seconds and peak memory of each operation."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        _give_back_freed()
        before = _memory("VmRSS")
        _forget_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        on_gpu = _gpu_bytes()
        at = time.process_time()
        seconds, made = _timed(work)
        row = {
            "name": name, "cpu_seconds": time.process_time() - at,
            "peak_bytes": _memory("VmHWM") - before,
        }  # fmt: skip
        if torch.cuda.is_available():
            row["gpu_peak_bytes"] = torch.cuda.max_memory_allocated() - on_gpu
        machine.keep_freed_memory()  # as the programs do
        more = []  # the first run also warmed up
        while sum(more) < REPEAT_SECONDS and seconds < LONG_SECONDS:
            made = None  # the next one may have its memory
            at = time.process_time()
            taken, made = _timed(work)
            more.append(taken)
            row["cpu_seconds"] = time.process_time() - at
        row["seconds"] = statistics.median(more) if more else seconds
        self.rows.append(row)
        return made


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, made


def _memory(field: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _forget_peak() -> None:
    """VmHWM counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _give_back_freed() -> None:
    """Memory that is kept and used again would hide what an operation takes, or add to it."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for threshold in (machine.M_MMAP_THRESHOLD, machine.M_TRIM_THRESHOLD):
            library.mallopt(threshold, GIVEN_BACK_BYTES)
        library.malloc_trim(0)


def _gpu_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def num_weights(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())


def weights_of(spec: ModelSpec) -> dict[str, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return {
        name: torch.empty(shape, device=device).normal_(std=0.02)
        for name, shape in tensor_shapes(spec).items()
    }


def plan_of(spec: ModelSpec) -> Plan:
    return build_plan(tensor_shapes(spec), {"grid": GRID}, RULES)


def measure_snap(measure: Meter, spec: ModelSpec, _: Path) -> None:
    plan, weights = measure("plan", lambda: plan_of(spec)), weights_of(spec)
    if torch.cuda.is_available():
        fused = FusedSnap(plan)
        fused(weights)  # compiles
        measure("snap, fused", lambda: fused(weights))
    measure("snap", lambda: plan.snap(weights))


def measure_file(measure: Meter, spec: ModelSpec, folder: Path) -> None:
    small, path = ModelSpec(64, 1, 16, 1, 1, 1), folder / "a.qat"
    pack(plan_of(small).encode(weights_of(small)), plan_of(small), {}, CODER)  # compiles
    plan = plan_of(spec)
    encoded = measure("encode", partial(plan.encode, weights_of(spec)))
    measure("decode", lambda: [item.decode() for item in encoded])
    measure("write", lambda: write_whole(path, pack(encoded, plan, {}, CODER)))
    measure("read", lambda: read_artifact(path))


def measure_solver(measure: Meter, spec: ModelSpec, _: Path) -> None:
    candidates.SIZES = SOLVER_SIZES
    plan, weights = plan_of(spec), weights_of(spec)
    count, seq_len = SENSITIVITY
    ids = torch.randint(spec.vocab_size, (count, 1, seq_len + 1))
    batches = [(row[:, :-1], row[:, 1:]) for row in ids]
    model = TrainedModel(spec, weights, plan, {}, is_on_grid=False)
    quiet = Console(quiet=True)
    solver = measure("solver, candidates", lambda: BudgetSolver(model, batches, "fp32", quiet))
    limit = int(sum(w.numel() for w in weights.values()) * BITS_PER_WEIGHT / 8)
    measure("solver, a limit", lambda: solver.solve(Budget(limit), {}, CODER))


def measure_gptq(measure: Meter, spec: ModelSpec, _: Path) -> None:
    plan, weights = plan_of(spec), weights_of(spec)
    ids = torch.randint(spec.vocab_size, CALIBRATION)
    inputs = measure("gptq, hessians", lambda: read_inputs(spec, weights, ids))
    measure("gptq, codes", lambda: encoded_by(plan, weights, gptq(inputs)))


def measure_checkpoint(measure: Meter, spec: ModelSpec, folder: Path) -> None:
    def trained() -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        model = model_of(spec)
        if torch.cuda.is_available():
            model.cuda()
        return model, build_optimizers(model, OptimizerSettings(), [])

    model, (muon, adam) = trained()
    for optimizer, names in ((muon, ["momentum_buffer"]), (adam, ["exp_avg", "exp_avg_sq"])):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = {name: torch.ones_like(parameter) for name in names}
            optimizer.state[parameter] = state | (
                {"step": torch.ones(())} if len(names) > 1 else {}
            )
    state = {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "optimizers": states_by_name((muon, adam), dict(model.named_parameters())),
        "progress": {"step": 1},
    }
    path = folder / "a.ckpt"
    measure("checkpoint", partial(save_checkpoint, path, state))
    del state, muon, adam, model
    again, optimizers = trained()

    def resume() -> None:
        found = load_checkpoint(path)
        assert found is not None
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                parameter.copy_(found["weights"][name])
        load_states(optimizers, dict(again.named_parameters()), found["optimizers"])

    measure("resume", resume)


PARTS: dict[str, Callable[[Meter, ModelSpec, Path], None]] = {
    "snap": measure_snap,
    "file": measure_file,
    "solver": measure_solver,
    "gptq": measure_gptq,
    "checkpoint": measure_checkpoint,
}


def _documents(num_bytes: int) -> Iterator[str]:
    """The Bible over and over, each document another."""
    chapters, made, number = corpus.web_bible(), 0, 0
    while made < num_bytes:
        text = f"{number} {chapters[number % len(chapters)]}"
        number, made = number + 1, made + len(text.encode())
        yield text


def measure_text(measure: Meter, megabytes: int, folder: Path) -> None:
    """A tokenizer, trained elsewhere, and text in a file -> shards."""
    path = folder / "a.jsonl"
    with open(path, "w") as file:
        for text in _documents(megabytes * 1_000_000):
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer, _ = train_tokenizer([*_documents(4_000_000)], 1024, folder / "t.model")
    measure(
        f"text, {megabytes} MB",
        lambda: write_shards(
            "text", lambda: corpus.text_documents([path]), tokenizer, 0.05, folder
        ),
    )


def one(part: str, size: str, folder: Path) -> None:
    """What a process of its own does: rows as JSON, one a line."""
    measure = Meter()
    if part == TEXT:
        measure_text(measure, int(size), folder)
    else:
        PARTS[part](measure, SIZES[size], folder)
    print(json.dumps(measure.rows))


def measured(part: str, size: str, folder: Path, most_seconds: float) -> list[Row]:
    """Rows of a process; none if it takes too long."""
    command = [sys.executable, __file__, "--one", part, size, "--folder", str(folder)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=most_seconds)
    except subprocess.TimeoutExpired:
        return []
    assert done.returncode == 0, f"{part}, {size}: exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def slope(cost: float, before: float, growth: float, fixed: float) -> float | None:
    """d log(cost) / d log(weights); None where a fixed part is most of the cost."""
    return math.log(cost / before) / math.log(growth) if min(cost, before) > fixed else None


class Growth:
    """Rows of one part, size after size."""

    def __init__(self, part: str, limit_seconds: float) -> None:
        self.part, self.limit_seconds = part, limit_seconds
        self.before: dict[str, Row] = {}

    def expected_seconds(self, weights: int) -> float:
        """Of the part at this size, by its slopes so far, of at least 1."""
        return sum(
            row["seconds"] * (weights / row["weights"]) ** max(row.get("seconds_slope") or 1.0, 1.0)
            for row in self.before.values()
        )

    def rows(self, size: str, folder: Path) -> list[Row]:
        """Measured now, or one that says how long it would take."""
        weights = num_weights(SIZES[size])
        expected = self.expected_seconds(weights)
        found: list[Row] = []
        if expected <= self.limit_seconds:
            found = measured(self.part, size, folder, 2 * self.limit_seconds + START_SECONDS)
        if not found:
            seconds = max(expected, self.limit_seconds)
            return [{"name": self.part, "size": size, "weights": weights, "not_run": seconds}]
        for row in found:
            row |= {"size": size, "weights": weights}
            row["peak"] = (row.get("gpu_peak_bytes", row["peak_bytes"])) / (4 * weights)
            if before := self.before.get(row["name"]):
                growth = weights / before["weights"]
                for what, fixed in (("seconds", FIXED_SECONDS), ("peak_bytes", FIXED_BYTES)):
                    row[f"{what}_slope"] = slope(row[what], before[what], growth, fixed)
            self.before[row["name"]] = row
        return found


def goals(rows: list[Row]) -> list[str]:
    """What does not hold of: no slope of seconds above ``MOST_SLOPE`` but GPTQ's, no peak above
    ``MOST_PEAK`` where fixed costs do not hide it."""
    missed = []
    for row in rows:
        where = f"{row['name']} at {row['size']}"
        steep = row.get("seconds_slope") or 0.0
        if steep > MOST_SLOPE and row["name"] not in CUBIC:
            missed.append(f"{where}: seconds grow with slope {steep:.2f}")
        if row.get("peak", 0.0) > MOST_PEAK and row["peak_bytes"] > LIBRARIES_BYTES:
            missed.append(f"{where}: peak {row['peak']:.2f} times the float32 weights")
    return missed


def line_of(row: Row) -> str:
    title = f"{row['name']:24}{row['size']:>6}"
    if "not_run" in row:
        return f"{title}   not run: it would take about {row['not_run']:.0f} s"
    slopes = [row.get(f"{what}_slope") for what in ("seconds", "peak_bytes")]
    cells = ["" if value is None else f"{value:.2f}" for value in slopes]
    line = f"{title}{row['seconds']:10.3f}{cells[0]:>8}{row['cpu_seconds']:10.3f}"
    line += f"{row['peak_bytes'] / 1e6:10.0f}{cells[1]:>8}"
    if "gpu_peak_bytes" in row:
        line += f"{row['gpu_peak_bytes'] / 1e6:10.0f}"
    return line + f"{row['peak']:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join([*PARTS, TEXT]), help="parts")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="of a part at a size")
    parser.add_argument("--one", nargs=2, metavar=("PART", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(*asked.one, asked.folder)
        return
    parts, sizes = asked.only.split(","), asked.sizes.split(",")
    if unknown := (set(parts) - {*PARTS, TEXT}) | (set(sizes) - set(SIZES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(f"{torch.get_num_threads()} threads, {gpu or 'no GPU'}; peak in MB and as a multiple of "
          "the float32 weights" + (" (the GPU's)" if gpu else ""))  # fmt: skip
    print(f"{'':24}{'':>6}{'seconds':>10}{'slope':>8}{'CPU s':>10}{'peak':>10}{'slope':>8}"
          f"{'GPU peak' if gpu else '':>{10 if gpu else 0}}{'x':>8}")  # fmt: skip
    rows: list[Row] = []
    for part in (part for part in PARTS if part in parts):
        growth = Growth(part, asked.limit_seconds)
        for size in (size for size in SIZES if size in sizes):
            with tempfile.TemporaryDirectory() as folder:
                found = growth.rows(size, Path(folder))
            rows += found
            print("\n".join(line_of(row) for row in found), flush=True)
    missed = goals(rows)
    if rows:
        print("\n".join(missed) or "all goals hold")
    texts: list[Row] = []
    if TEXT in parts:
        print(f"\n{'':32}{'MB/s':>8}{'peak MB':>9}")
        for megabytes in TEXTS:
            with tempfile.TemporaryDirectory() as folder:
                (row,) = measured(TEXT, str(megabytes), Path(folder), 600)
            texts.append(row)
            speed = megabytes / row["seconds"]
            print(f"{row['name']:32}{speed:8.1f}{row['peak_bytes'] / 1e6:9.0f}", flush=True)
    out = {"gpu": gpu, "threads": torch.get_num_threads(), "models": rows, "missed": missed,
           "text": texts}  # fmt: skip
    (ROOT / "logs" / "growth.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
