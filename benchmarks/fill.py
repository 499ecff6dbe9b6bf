"""The budget solver against rounding on one grid, at equal bytes, and its time on a large model.

    .venv/bin/python benchmarks/fill.py logs/runs/RUN    # a finished run's checkpoint, its own data
    .venv/bin/python benchmarks/fill.py --golf          # 9x512, 17 M untrained weights: seconds

Each grid stores the masters as they are; the solver then gets exactly as many bytes. Scores are
val_bpb of what the file gives back. Table on stdout, JSON in ``logs/fill.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.artifact.container import pack  # noqa: E402
from qat.budget.budget import Budget  # noqa: E402
from qat.budget.fill import BudgetSolver, TrainedModel  # noqa: E402
from qat.evaluation.score import Scorer  # noqa: E402
from qat.golf.bundle import count_code_bytes  # noqa: E402
from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.ptq.calibration import calibration_batches  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import build_plan  # noqa: E402
from qat.runs.result import Result  # noqa: E402
from qat.runs.store_again import stored_tensors  # noqa: E402
from qat.settings.schema import DataSettings, EvalSettings, ModelSettings  # noqa: E402
from qat.text.shards import TokenStream  # noqa: E402
from qat.text.source import from_settings  # noqa: E402
from qat.text.tokenizer import Tokenizer  # noqa: E402
from qat.training.build import spec_of  # noqa: E402

GRIDS = {
    "int6": Grid(bits=6),
    "int6_sdclip": Grid(bits=6, scale_rule="sigma", sigma=12.85),
    "int5": Grid(bits=5),
    "int4_g64": Grid(bits=4, group_size=64),
    "int4": Grid(bits=4),
    "int3": Grid(bits=3),
    "ternary": Grid(levels="ternary", scale_rule="absmean", refit=True),
}
RULES = {"*.weight": "grid", "*": "fp32"}
GOLF = ModelSpec(1024, 9, 512, 8, 4, 2, True)


def solver_for(shape: ModelSpec, weights, stream: TokenStream, seq_len: int, precision: str):
    batches = calibration_batches(stream, 32_768, 4096, seq_len)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    plan = build_plan(shapes, {"grid": GRIDS["int6"]}, RULES)
    model = TrainedModel(shape, weights, plan, {}, is_on_grid=False)
    return BudgetSolver(model, batches, precision, Console(quiet=True))


def against_grids(folder: Path) -> list[dict]:
    result = Result.read(folder)
    assert result is not None, f"{folder} has no result.json"
    s = result.settings
    shape = spec_of(ModelSettings(**s["model"]))
    source = from_settings(DataSettings(**s["data"]), shape.vocab_size)
    weights, _ = stored_tensors(folder / "checkpoint.ckpt")
    weights = {name: w.float() for name, w in weights.items()}
    scorer = Scorer(
        shape, TokenStream(source.val_files, "val"), Tokenizer(source.tokenizer).byte_table,
        s["seq_len"], EvalSettings(**s["eval"]), torch.device("cpu"), Console(quiet=True),
    )  # fmt: skip
    stream = TokenStream(source.train_files, "train")
    solver = solver_for(shape, weights, stream, s["seq_len"], s["precision"])
    before = scorer.score(weights, "float").val_bpb
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    rows = []
    print(f"float {before:.5f}")
    print(f"{'grid':12} {'bytes':>9} {'gap':>9} {'solver bytes':>13} {'of them':>9} {'gap':>9}")
    for label, grid in GRIDS.items():
        plan = build_plan(shapes, {"grid": grid}, RULES)
        size = len(pack(plan.encode(weights), plan, {}, "mix"))
        gap = scorer.score(plan.snap(weights), label).val_bpb - before
        fit, fitted = solver.solve(Budget(size), {}, "mix")
        stored = fit.plan.snap(fit.weights, fit.scales)
        gap_fitted = scorer.score(stored, "fitted").val_bpb - before
        share = fitted.num_bytes / size
        print(f"{label:12} {size:9,} {gap:+9.5f} {fitted.num_bytes:13,} {share:9.3%} "
              f"{gap_fitted:+9.5f}", flush=True)  # fmt: skip
        rows.append({"grid": label, "bytes": size, "gap": gap, "note": fitted.note,
                     "fitted_bytes": fitted.num_bytes, "fitted_gap": gap_fitted})  # fmt: skip
    return rows


def golf_seconds() -> list[dict]:
    torch.manual_seed(0)
    weights = {name: p.detach() for name, p in GPT(GOLF).named_parameters()}
    for name, w in weights.items():
        if name.endswith("proj.weight"):
            w.normal_(std=0.02)  # zero at the start, so nothing to store
    source = from_settings(DataSettings(source="web_bible"), GOLF.vocab_size)
    started = time.perf_counter()
    stream = TokenStream(source.train_files, "train")
    solver = solver_for(GOLF, weights, stream, 1024, "bf16")
    rows = []
    measured = time.perf_counter() - started
    print(f"sensitivities and candidates: {measured:.1f} s")
    for limit in (16_000_000, 8_000_000):
        started = time.perf_counter()
        _, fitted = solver.solve(Budget(limit, count_code_bytes()), {}, "mix")
        seconds = time.perf_counter() - started
        share = fitted.num_bytes / (limit - count_code_bytes())
        print(f"limit {limit:,}: {share:.3%} filled in {seconds:.1f} s", flush=True)
        rows.append({"limit": limit, "share": share, "measure_s": measured, "fit_s": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder")
    parser.add_argument("--golf", action="store_true")
    asked = parser.parse_args()
    if asked.golf == (asked.run is not None):
        parser.error("give a run's folder, or --golf")
    rows = golf_seconds() if asked.golf else against_grids(asked.run)
    (ROOT / "logs" / "fill.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
