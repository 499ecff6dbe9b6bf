"""What snapping costs: the 9x512 model's matrices, this project's grids against the field's ways.

    .venv/bin/python benchmarks/snap.py            # table on stdout, JSON in logs/snap.json
    .venv/bin/python benchmarks/snap.py mxfp4 q4_0   # of these grids alone

Rows, measured in turn in one process, medians of ``REPEATS`` (of 3 where one takes over a second);
ratios hold on a noisy machine, times do not:

    amax, eager / compiled   a plain per-row int8 fake quantization, one tensor after the other
    quantile                 the same with torch.quantile (PR 145: +20 % per scale)
    torchao                  IntxFakeQuantizer, int8 per row
    ours, fused              what training does with ``compile=true`` (its bits are checked here)
    ours, plain              ``Plan.snap``: what training does with ``compile=false``, and export
    ours, compiled           on CUDA, of grids without a kernel there: the pass of a CPU, as exact
                             as inductor can. Not used by training: it is said how many weights
                             have other bits than the plain ones, and it has to be none
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.quantize.fused import CompiledSnap, FusedSnap, has_kernel, is_fusable  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import Plan, build_plan  # noqa: E402

# Divisions rounded once, no contraction of products and sums, subnormals kept. Older versions of
# torch have some of them under another name.
EXACT = {
    "emulate_precision_casts": True,
    "emulate_divison_rounding": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
}
REPEATS, REPEATS_OF_SLOW, SLOW_SECONDS = 15, 3, 1.0
GOLF = ModelSpec(1024, 9, 512, 8, 4, 2, True)
OURS = {
    "int8 percentile": Grid(bits=8, scale_rule="percentile"),
    "int8 amax": Grid(bits=8),
    "int6 amax": Grid(bits=6),
    "int4 g64": Grid(bits=4, group_size=64),
    "int8_golf": Grid(
        bits=8, scale_rule="percentile", scale_floor=1 / 127, code_scale_dtype="fp32"
    ),
    "ternary": Grid("ternary", scale_rule="absmean", refit=True),
    "mxfp4": Grid("e2m1", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "mxfp6": Grid("e2m3", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "mxfp8": Grid("fp8_e4m3", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "nvfp4": Grid("e2m1", group_size=16, scale_dtype="e4m3"),
    "nf4": Grid("nf4", group_size=64),
    "q4_0": Grid("q4_0", group_size=32),
    "q4_1": Grid("q4_1", group_size=32),
    "q5_0": Grid("q5_0", group_size=32),
    "q8_0": Grid("q8_0", group_size=32),
}


def amax_fake_quant(w: torch.Tensor) -> torch.Tensor:
    scale = (w.abs().amax(1, keepdim=True) / 127).half().float()
    return (w / scale).round().clamp(-127, 127) * scale


def quantile_fake_quant(w: torch.Tensor) -> torch.Tensor:
    scale = (torch.quantile(w.abs(), 0.9999984, dim=1, keepdim=True) / 127).half().float()
    return (w / scale).round().clamp(-127, 127) * scale


def torchao_fake_quant() -> Callable[[torch.Tensor], torch.Tensor]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    config = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    return IntxFakeQuantizer(config)


def exact_options() -> dict[str, bool]:
    from torch._inductor import config

    def is_known(name: str) -> bool:
        group, _, last = name.rpartition(".")
        return hasattr(getattr(config, group, None) if group else config, last)

    return {name: value for name, value in EXACT.items() if is_known(name)}


def compiled_pass(
    plan: Plan, weights: dict[str, torch.Tensor]
) -> tuple[Callable[[], object], int] | None:
    """Of the tensors without a kernel: the pass, and how many weights it gives other bits."""
    from torch._inductor import config

    entries = [e for e in plan.on_grid if is_fusable(e) and not has_kernel(e)]
    if not entries:
        return None
    masters = {entry.name: weights[entry.name] for entry in entries}
    snapped = {name: torch.empty_like(w) for name, w in masters.items()}
    snap = CompiledSnap(entries)
    with config.patch(exact_options()):
        snap(masters, snapped)
    exact = plan.snap(weights)
    others = [
        (w.view(torch.int32) != exact[name].view(torch.int32)).sum() for name, w in snapped.items()
    ]
    return lambda: snap(masters, snapped), int(sum(others))


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        weights = {
            name: torch.randn_like(p, device=device)
            for name, p in GPT(GOLF).named_parameters()
            if name.endswith(".weight")
        }
    shapes = {name: tuple(w.shape) for name, w in weights.items()}

    def each(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: [function(w) for w in weights.values()]

    arms: dict[str, Callable[[], object]] = {
        "amax, compiled": each(torch.compile(amax_fake_quant, dynamic=False)),
        "amax, eager": each(amax_fake_quant),
        "quantile": each(quantile_fake_quant),
        "torchao": each(torchao_fake_quant()),
    }
    asked = sys.argv[1:] or list(OURS)
    if unknown := [name for name in asked if name not in OURS]:
        sys.exit(f"error: {unknown[0]}: no such row; choose from {', '.join(OURS)}")
    for name in tqdm(asked, "compile", leave=False):
        grid = OURS[name]
        plan = build_plan(shapes, {"grid": grid}, {"*": "grid"})
        fused = FusedSnap(plan)
        fused_weights = fused(weights)
        for tensor, snapped in fused_weights.items():
            stored = plan.entries[tensor].snap(weights[tensor])
            assert torch.equal(snapped.view(torch.int32), stored.view(torch.int32)), (name, tensor)
        if fused_weights:
            arms[f"ours, fused: {name}"] = lambda fused=fused: fused(weights)
        elif device.type == "cuda" and (found := compiled_pass(plan, weights)):
            arms[f"ours, compiled: {name}"] = found[0]
            tqdm.write(f"ours, compiled: {name}: {found[1]:,} weights have other bits")
        arms[f"ours, plain: {name}"] = lambda plan=plan: plan.snap(weights)

    def timed(arm: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        arm()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        first = {name: timed(arm) for name, arm in tqdm(arms.items(), "warm up", leave=False)}
        slow = {name for name, took in first.items() if took > SLOW_SECONDS}
        for turn in tqdm(range(REPEATS), "time", leave=False):
            for name, arm in arms.items():
                if name in slow and turn >= REPEATS_OF_SLOW:
                    continue
                if name not in slow:
                    for _ in range(2):  # its caches and its memory, as in a loop of its own
                        arm()
                seconds[name].append(timed(arm))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base, quantile = medians["amax, compiled"], medians["quantile"]
    elements = sum(w.numel() for w in weights.values())
    print(f"{elements:,} weights, {device}, {torch.get_num_threads()} threads")
    print(f"{'':30} {'ms':>8} {'x compiled amax':>16} {'quantile / this':>16}")
    for name, median in medians.items():
        print(f"{name:30} {1e3 * median:8.1f} {median / base:16.2f} {quantile / median:16.2f}")
    out = ROOT / "logs" / "snap.json"
    out.write_text(json.dumps({"weights": elements, "device": str(device), "seconds": medians}))


if __name__ == "__main__":
    main()
