"""What post-training methods cost and gain: all matrices of the 9x512 model.

    .venv/bin/python benchmarks/gptq.py            # tables on stdout, JSON in logs/gptq.json

Inputs are mixed channels of log-normal size and weights are Gaussian: no trained model. So believe
the seconds, and of the errors the order rather than the size. An error is the sum of Tr(E H E^T)
over all matrices, over that of rounding to nearest on the same grid. Matrices that read the same
input share one factor. Collecting hessians is not timed. Seconds are those of all layers on int4;
the other grids are tried on the first layer.

Last, GPTQ of the whole 9x512 model with random weights, as ``task=cabinet`` does it: 128 sequences
of 512 random tokens through the model to collect the hessians, then all matrices on int4 g64.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.cabinet.grid_variants import plan_for  # noqa: E402
from qat.cabinet.variant import Frozen  # noqa: E402
from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.ptq.awq import awq  # noqa: E402
from qat.ptq.calibration import MAX_TOKENS, random_sequences, read_inputs  # noqa: E402
from qat.ptq.gptq import (  # noqa: E402
    GptqFactor,
    row_output_errors,
)
from qat.ptq.lqer import lqer  # noqa: E402
from qat.ptq.methods import encoded_by  # noqa: E402
from qat.ptq.methods import gptq as gptq_method  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.rounding import decode, snap, weighted_scales  # noqa: E402

LAYERS, TOKENS, RANK = 9, 4096, 16
# One layer: the columns of an input, and the rows of the matrices that read it.
READERS = ((512, (512, 256, 256)), (512, (512,)), (512, (1024,)), (1024, (512,)))
GRIDS = {
    "int4": Grid(bits=4),
    "int4 mse": Grid(bits=4, scale_rule="mse"),
    "int4 g64": Grid(bits=4, group_size=64),
    "int3": Grid(bits=3),
    "int3 mse": Grid(bits=3, scale_rule="mse"),
}


@dataclass(frozen=True)
class Input:
    """What is known of one input of a layer."""

    hessian: Tensor
    mean_magnitude: Tensor
    factor: GptqFactor
    ordered: GptqFactor


def nearest(w: Tensor, grid: Grid, read: Input) -> Tensor:
    return snap(w, grid)


def weighted(w: Tensor, grid: Grid, read: Input) -> Tensor:
    return snap(w, grid, weighted_scales(w, grid, read.hessian.diagonal()))


def gptq(w: Tensor, grid: Grid, read: Input) -> Tensor:
    return decode(read.factor.quantize(w, grid), grid)


def gptq_ordered(w: Tensor, grid: Grid, read: Input) -> Tensor:
    return decode(read.ordered.quantize(w, grid), grid)


def gptq_weighted(w: Tensor, grid: Grid, read: Input) -> Tensor:
    scales = weighted_scales(w, grid, read.hessian.diagonal())
    return decode(read.ordered.quantize(w, grid, scales), grid)


def scaled(w: Tensor, grid: Grid, read: Input) -> Tensor:
    found = awq(w, read.hessian, read.mean_magnitude, grid)
    return decode(found.coded, found.grid)


def scaled_gptq(w: Tensor, grid: Grid, read: Input) -> Tensor:
    found = awq(w, read.hessian, read.mean_magnitude, grid)
    return decode(read.ordered.quantize(w, found.grid, found.coded.scales.float()), found.grid)


def corrected(w: Tensor, grid: Grid, read: Input) -> Tensor:
    stored = snap(w, grid)
    return lqer(w, stored, read.hessian.diagonal(), RANK).added_to(stored)


ARMS = {
    "nearest": nearest,
    "nearest, weighted scales": weighted,
    "gptq": gptq,
    "gptq, act order": gptq_ordered,
    "gptq, act order, weighted scales": gptq_weighted,
    "awq": scaled,
    "awq, then gptq, act order": scaled_gptq,
    f"lqer, rank {RANK} (more bytes)": corrected,
}


def whole_model() -> dict[str, float]:
    """Seconds of calibration and of GPTQ."""
    shape = ModelSpec(1024, LAYERS, 512, 8, 4, 2, True)
    weights = {name: torch.randn_like(p) * 0.02 for name, p in GPT(shape).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: w.detach().to(device) for name, w in weights.items()}
    started = time.perf_counter()
    inputs = read_inputs(shape, weights, random_sequences(shape, MAX_TOKENS, 0))
    calibrated = time.perf_counter()
    grid = Grid(bits=4, group_size=64)
    encoded_by(
        plan_for(Frozen.of_spec(shape, weights, {}), grid, Grid(bits=8)),
        weights,
        gptq_method(inputs),
    )
    return {
        "calibration": calibrated - started,
        "gptq": time.perf_counter() - calibrated,
    }


def main() -> None:
    torch.manual_seed(0)
    seconds: dict[str, float] = defaultdict(float)
    errors: dict[str, dict[str, float]] = {arm: defaultdict(float) for arm in ARMS}
    for index, (columns, rows) in enumerate(READERS * LAYERS):
        mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
        x = torch.randn(TOKENS, columns) @ mix * torch.randn(columns).exp()
        hessian = x.T @ x / TOKENS
        started = time.perf_counter()
        factor = GptqFactor(hessian)
        seconds["one factor per input"] += time.perf_counter() - started
        read = Input(hessian, x.abs().mean(0), factor, GptqFactor(hessian, act_order=True))
        for count in rows:
            w = 0.02 * torch.randn(count, columns)
            for label, grid in (GRIDS if index < len(READERS) else {"int4": GRIDS["int4"]}).items():
                for arm, method in ARMS.items():
                    if grid.group_size is not None and method in (scaled, scaled_gptq):
                        continue  # column scales go with one scale per row
                    started = time.perf_counter()
                    stored = method(w, grid, read)
                    if label == "int4":
                        seconds[arm] += time.perf_counter() - started
                    errors[arm][label] += float(row_output_errors(stored - w, hessian).sum())
    print(f"seconds, int4, {torch.get_num_threads()} threads")
    for part, total in seconds.items():
        print(f"{part:34}{total:10.2f}")
    print(f"\n{'Tr(E H E^T) / nearest':34}" + "".join(f"{label:>10}" for label in GRIDS))
    base = errors["nearest"]
    for arm, found in errors.items():
        cells = [f"{found[g] / base[g]:10.3f}" if g in found else f"{'':10}" for g in GRIDS]
        print(f"{arm:34}" + "".join(cells))
    whole = whole_model()
    print("\nwhole model, " + ", ".join(f"{part} {s:.1f} s" for part, s in whole.items()))
    out = ROOT / "logs" / "gptq.json"
    out.write_text(json.dumps({"seconds": seconds, "errors": errors, "whole_model": whole}))


if __name__ == "__main__":
    main()
