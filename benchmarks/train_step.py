"""Training steps: this engine against a plain loop of the same model and optimizers.

    .venv/bin/python benchmarks/train_step.py [laptop|golf] [--compile] [--steps N] [--turns N]

Arms, in turns of N steps each, so that a noisy machine slows them alike; tokens/s of the medians:

    engine       TrainingLoop under Lightning's Trainer, as train.py runs it
    plain        the simplest loop: the same sums by torch's attention and cross-entropy, as the
                 challenge's baseline writes them, torch.optim.Muon matrix by matrix, torch's Adam
    plain, ours  the same loop with this project's model and optimizers: what is left is what
                 Lightning, the QAT switch and the clock add

MFU counts 6 * parameters * tokens, of ``--peak-tflops`` (dense bf16; 989 for an H100 or H200).
Table on stdout, JSON in ``logs/train_step.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from qat_price import PROFILES  # noqa: E402

from qat.model.gpt import GPT, Attention  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.qat_model import QatModel  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import Plan  # noqa: E402
from qat.settings.schema import OptimizerSettings  # noqa: E402
from qat.text.batches import BatchShape, TrainingBatches, micro_batch  # noqa: E402
from qat.text.shards import ShardWriter, TokenStream  # noqa: E402
from qat.training.fit import build_trainer  # noqa: E402
from qat.training.loop import Pace, TrainingLoop  # noqa: E402
from qat.training.optimizers import build_optimizers  # noqa: E402
from qat.training.schedule import Schedule  # noqa: E402

PRIMING_STEPS = 2
Turn = Callable[[int], float]  # number of steps -> seconds a step


def engine(shape: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool) -> Turn:
    torch.manual_seed(0)
    gpt = GPT(shape)
    plan = Plan.for_model(gpt, Grid(bits=8))
    pace = Pace(batch.micro_batches, PRIMING_STEPS, "bf16", compiled)

    def turn(steps: int) -> float:
        schedule = Schedule(None, steps, 0, 0.85, 0.95, 500)
        loop = TrainingLoop(QatModel(gpt, plan), schedule, OptimizerSettings(), pace)
        batches = TrainingBatches(stream, batch, 0, PRIMING_STEPS)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        build_trainer([], []).fit(loop, loader)
        return loop.progress.elapsed_seconds / steps

    return turn


class PlainAttention(Attention):
    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True
        )


class PlainGPT(GPT):
    """The same weights and sums, written with torch's own operations."""

    def __init__(self, shape: ModelSpec) -> None:
        super().__init__(shape)
        for block in self.blocks:
            block.attn.__class__ = PlainAttention

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        logits_BTV = super().forward(ids_BT)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def plain(
    shape: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool, ours: bool
) -> Turn:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = (GPT(shape) if ours else PlainGPT(shape)).to(device)
    forward = torch.compile(gpt) if compiled else gpt
    matrices = [p for name, p in gpt.named_parameters() if "blocks" in name and p.dim() == 2]
    matrices = [p for p in matrices if min(p.shape) > 2]
    taken = {id(p) for p in matrices}
    others = [p for p in gpt.parameters() if id(p) not in taken]
    settings = OptimizerSettings()
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.Adam(others, lr=0.04, betas=(settings.adam_beta1, settings.adam_beta2)),
    ]
    if ours:
        optimizers = build_optimizers(gpt, settings, [])

    def step(number: int) -> None:
        for micro in range(batch.micro_batches):
            ids, targets = micro_batch(stream, batch, number, 0, micro)
            with torch.autocast(device.type, torch.bfloat16):
                loss: Tensor = forward(ids.to(device), targets.to(device))
            (loss / batch.micro_batches).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def turn(steps: int) -> float:
        for number in range(PRIMING_STEPS):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for number in range(steps):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", choices=PROFILES, default="laptop")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="of every arm in a turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--peak-tflops", type=float, help="to say MFU")
    asked = parser.parse_args()
    shape, sequences, length = PROFILES[asked.profile]
    batch = BatchShape(sequences * length, length)
    folder = ROOT / "logs"
    writer = ShardWriter(folder, "train_step")
    writer.write(np.random.default_rng(0).integers(shape.vocab_size, size=1_000_000).tolist())
    writer.close()
    stream = TokenStream([folder / "train_step_000000.bin"], "benchmark")
    arms = {
        "engine": engine(shape, stream, batch, asked.compile),
        "plain": plain(shape, stream, batch, asked.compile, ours=False),
        "plain, ours": plain(shape, stream, batch, asked.compile, ours=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peak_bytes = dict.fromkeys(arms, 0)
    for turn in range(asked.turns + 1):  # the first one compiles
        for name, arm in arms.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            taken = arm(asked.steps)
            if turn:
                seconds[name].append(taken)
            if torch.cuda.is_available():
                peak_bytes[name] = torch.cuda.max_memory_allocated()
    flops = 6 * sum(p.numel() for p in GPT(shape).parameters()) * batch.batch_tokens
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    how = "compiled" if asked.compile else "eager"
    print(
        f"{asked.profile}, {how}, {where}, {torch.get_num_threads()} threads, {torch.__version__}"
    )
    print(f"{'arm':14} {'ms/step':>9} {'tokens/s':>10} {'x plain':>8} {'MFU':>6} {'peak MB':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        pairs = zip(seconds["plain"], times, strict=True)
        ratio = statistics.median(base / own for base, own in pairs)
        mfu = f"{flops / median / asked.peak_tflops / 1e12:6.1%}" if asked.peak_tflops else "     -"
        peak = f"{peak_bytes[name] / 1e6:8.0f}" if peak_bytes[name] else "       -"
        rate = batch.batch_tokens / median
        print(f"{name:14} {1e3 * median:9.1f} {rate:10,.0f} {ratio:8.3f} {mfu} {peak}")
    row = {"profile": asked.profile, "how": how, "where": where, "seconds": seconds}
    (folder / "train_step.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
