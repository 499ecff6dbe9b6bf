"""Training steps: this engine against the challenge's own trainer.

    .venv/bin/python benchmarks/train_step.py [laptop|golf] [--compile] [--steps N] [--turns N]

Arms, in turns of N updates each, so that a noisy machine slows them alike; ratios are medians over
turns, against the challenge's trainer:

    challenge    ``challenge_trainer.py``: the challenge's baseline in a loop of its own
    engine       TrainingLoop under Lightning's Trainer, as train.py runs it, QAT off
    engine, int6 the same with int6 QAT on from the first update; runs of one shape share a graph
    bare loop    this project's model and optimizers in the simplest loop: what is left is what
                 Lightning, the switch and the clock add

Each side has a process of its own, as it has when its own script is run: ``train.py`` asks glibc to
keep freed memory, which the challenge's script does not. ``challenge, keeping`` is what the
challenge's trainer would take with that line (on CPUs; a GPU's memory is torch's).

``--micro-tokens`` are the tokens of a forward pass of the engine (several: an arm each); the
challenge's are 65,536 at the golf shapes, as its script takes them on one GPU.

Then engine and challenge train 20 updates from the same weights on the same tokens, and the largest
distance of their losses is said. MFU counts 6 * parameters * tokens, of ``--peak-tflops`` (dense
bf16; 989 for an H100 or H200). Table on stdout, JSON in ``logs/train_step.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from challenge_trainer import ChallengeTrainer  # noqa: E402
from qat_price import PROFILES  # noqa: E402

from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.qat_model import QatModel  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import Plan  # noqa: E402
from qat.settings.machine import keep_freed_memory  # noqa: E402
from qat.settings.schema import OptimizerSettings  # noqa: E402
from qat.text.batches import BatchShape, TrainingBatches, micro_batch  # noqa: E402
from qat.text.shards import TokenStream  # noqa: E402
from qat.training.fit import build_trainer  # noqa: E402
from qat.training.loop import Pace, TrainingLoop, compiled_loss, loss_of  # noqa: E402
from qat.training.optimizers import build_optimizers  # noqa: E402
from qat.training.schedule import Schedule  # noqa: E402

TEXT = ROOT / "tests" / "data" / "golf" / "fineweb_train_000000.bin"
PRIMING_STEPS = 2
UPDATES_COMPARED = 20
GOLF_STEP_TOKENS = 524_288
Turn = Callable[[int], float]  # number of updates -> seconds an update
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def schedule(steps: int, starts_qat: bool) -> Schedule:
    return Schedule(None, steps, 0, 0.85, 0.95, 500, 0 if starts_qat else None)


class Losses(Logger):
    """Keeps the losses of a run."""

    name = version = "losses"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.found.append(metrics["train_loss"])

    def log_hyperparams(self, *_: object, **__: object) -> None:
        pass


def trained(
    model: GPT, spec: ModelSpec, stream: TokenStream, batch: BatchShape, steps: int,
    compiled: bool, qat: bool = False, losses: Losses | None = None,
) -> TrainingLoop:  # fmt: skip
    loop = TrainingLoop(
        QatModel(model, Plan.for_model(model, Grid(bits=6)), fused=compiled),
        schedule(steps, qat),
        OptimizerSettings(),
        Pace(batch.micro_batches, PRIMING_STEPS, "bf16"),
        loss=compiled_loss(spec) if compiled else None,
    )
    loader = torch.utils.data.DataLoader(
        TrainingBatches(stream, batch, 0, PRIMING_STEPS), batch_size=None
    )
    build_trainer([losses] if losses else [], []).fit(loop, loader)
    return loop


def engine(
    spec: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool, qat: bool
) -> Turn:
    torch.manual_seed(0)
    model = GPT(spec)

    def turn(steps: int) -> float:
        loop = trained(model, spec, stream, batch, steps, compiled, qat)
        assert loop.progress.qat_steps == (steps if qat else 0)
        return loop.progress.elapsed_seconds / steps

    return turn


def wait() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(update: Callable[[int], object]) -> Turn:
    def turn(steps: int) -> float:
        for number in range(PRIMING_STEPS):
            update(number)
        started = wait()
        for number in range(steps):
            update(number)
        return (wait() - started) / steps

    return turn


def challenge_trainer(spec: ModelSpec, length: int, compiled: bool) -> ChallengeTrainer:
    torch.manual_seed(0)
    sizes = (
        spec.vocab_size, spec.num_layers, spec.dim, spec.num_heads, spec.num_kv_heads,
        spec.mlp_mult, spec.tie_embeddings, length,
    )  # fmt: skip
    return ChallengeTrainer(sizes, GPT(spec).state_dict(), DEVICE, True, compiled)


def challenge_update(
    trainer: ChallengeTrainer, stream: TokenStream, batch: BatchShape, number: int, momentum: float
) -> Tensor:
    count = batch.micro_batches
    pieces = (micro_batch(stream, batch, number, 0, micro) for micro in range(count))
    return trainer.update(pieces, count, 1.0, momentum)


def challenge(spec: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool) -> Turn:
    trainer = challenge_trainer(spec, batch.seq_len, compiled)
    return timed(lambda number: challenge_update(trainer, stream, batch, number, 0.95))


def bare(spec: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool) -> Turn:
    torch.manual_seed(0)
    model = GPT(spec).to(DEVICE)
    weights = dict(model.named_parameters())
    loss = compiled_loss(spec) if compiled else loss_of(model)
    optimizers = build_optimizers(model, OptimizerSettings(), [])

    def update(number: int) -> None:
        for micro in range(batch.micro_batches):
            ids, targets = micro_batch(stream, batch, number, 0, micro)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                found = loss(dict(weights), ids.to(DEVICE), targets.to(DEVICE))
            (found / batch.micro_batches).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return timed(update)


def largest_distance(
    spec: ModelSpec, stream: TokenStream, batch: BatchShape, compiled: bool
) -> tuple[float, float]:
    """Of the losses of the first updates, in nats; and the last loss."""
    torch.manual_seed(0)
    losses = Losses()
    trained(GPT(spec), spec, stream, batch, UPDATES_COMPARED, compiled, losses=losses)
    trainer = challenge_trainer(spec, batch.seq_len, compiled)
    pace = schedule(UPDATES_COMPARED, False)
    theirs = [
        float(challenge_update(trainer, stream, batch, number, pace.momentum(number)))
        for number in range(UPDATES_COMPARED)
    ]
    return max(abs(a - b) for a, b in zip(losses.found, theirs, strict=True)), theirs[-1]


@dataclass(frozen=True)
class Asked:
    """What all processes are told."""

    profile: str
    compiled: bool
    micro_tokens: list[int]  # of the engine; none: as many as the challenge takes

    @property
    def spec(self) -> ModelSpec:
        return PROFILES[self.profile][0]

    @property
    def seq_len(self) -> int:
        return PROFILES[self.profile][2]

    @property
    def stream(self) -> TokenStream:
        return TokenStream([TEXT], "the text of this benchmark")

    @property
    def pass_tokens(self) -> int:
        """Tokens of a forward pass of the challenge."""
        return PROFILES[self.profile][1] * self.seq_len

    @property
    def sizes(self) -> list[int]:
        """Tokens of the engine's forward passes."""
        return self.micro_tokens or [self.pass_tokens]

    @property
    def step_tokens(self) -> int:
        return GOLF_STEP_TOKENS if self.profile == "golf" else self.pass_tokens

    def cut(self, pass_tokens: int) -> BatchShape:
        return BatchShape(self.step_tokens, self.seq_len, 1, self.step_tokens // pass_tokens)


def challenges_arms(asked: Asked) -> dict[str, Turn]:
    batch = asked.cut(asked.pass_tokens)
    return {"challenge": challenge(asked.spec, asked.stream, batch, asked.compiled)}


def challenges_arms_keeping(asked: Asked) -> dict[str, Turn]:
    keep_freed_memory()
    return {"challenge, keeping": challenges_arms(asked)["challenge"]}


def our_arms(asked: Asked) -> dict[str, Turn]:
    keep_freed_memory()
    spec, stream = asked.spec, asked.stream
    arms = {}
    for size in asked.sizes:
        label = f", {size:,}" if len(asked.sizes) > 1 else ""
        for name, qat in (("engine", False), ("engine, int6", True)):
            arms[f"{name}{label}"] = engine(spec, stream, asked.cut(size), asked.compiled, qat)
    arms["bare loop"] = bare(spec, stream, asked.cut(asked.sizes[0]), asked.compiled)
    return arms


@dataclass(frozen=True)
class Taken:
    seconds: float  # an update
    graphs: int  # new
    peak_bytes: int  # of a GPU


_arms: dict[str, Turn] = {}  # of this process


def begin(build: Callable[[Asked], dict[str, Turn]], asked: Asked) -> list[str]:
    _arms.update(build(asked))
    return list(_arms)


def take_turn(name: str, steps: int) -> Taken:
    graphs, peak_bytes = counters["stats"]["unique_graphs"], 0
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _arms[name](steps)
    if DEVICE.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()  # for the other process
    return Taken(seconds, counters["stats"]["unique_graphs"] - graphs, peak_bytes)


def in_turns(asked: Asked, steps: int, turns: int) -> Mapping[str, list[Taken]]:
    """Of every arm the first turn, which compiles, and ``turns`` more."""
    builders = [challenges_arms, our_arms]
    if DEVICE.type == "cpu":
        builders.insert(1, challenges_arms_keeping)
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in builders]
    try:
        begun = [pool.submit(begin, b, asked) for pool, b in zip(pools, builders, strict=True)]
        arms = [(name, p) for p, b in zip(pools, begun, strict=True) for name in b.result()]
        taken: dict[str, list[Taken]] = {name: [] for name, _ in arms}
        for turn in range(turns + 1):
            for name, pool in arms:
                found = pool.submit(take_turn, name, steps if turn else 1).result()
                taken[name].append(found)
        return taken
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", choices=PROFILES, default="laptop")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="of every arm in a turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--micro-tokens", default="", help="of the engine: 65536,131072")
    parser.add_argument("--peak-tflops", type=float, help="to say MFU")
    typed = parser.parse_args()
    sizes = [int(size) for size in typed.micro_tokens.split(",") if size]
    asked = Asked(typed.profile, typed.compile, sizes)
    spec, length, step_tokens = asked.spec, asked.seq_len, asked.step_tokens
    if odd := [size for size in sizes if step_tokens % size or size % length]:
        parser.error(f"--micro-tokens: {odd[0]} does not divide {step_tokens} into {length}s")
    taken = in_turns(asked, typed.steps, typed.turns)
    seconds = {name: [turn.seconds for turn in turns[1:]] for name, turns in taken.items()}
    peak_bytes = {name: max(turn.peak_bytes for turn in turns) for name, turns in taken.items()}
    graphs = {name: turns[0].graphs for name, turns in taken.items()}
    flops = 6 * sum(p.numel() for p in GPT(spec).parameters()) * step_tokens
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    how = "compiled" if asked.compiled else "eager"
    print(
        f"{asked.profile}, {how}, {where}, {torch.get_num_threads()} threads, {torch.__version__}"
    )
    print(
        f"{'arm':22} {'ms/update':>9} {'tokens/s':>10} {'x challenge':>11} {'MFU':>6} "
        f"{'peak MB':>8} {'new graphs':>10}"
    )
    ratios = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        pairs = zip(seconds["challenge"], times, strict=True)
        ratios[name] = statistics.median(base / own for base, own in pairs)
        mfu = f"{flops / median / typed.peak_tflops / 1e12:6.1%}" if typed.peak_tflops else "     -"
        peak = f"{peak_bytes[name] / 1e6:8.0f}" if peak_bytes[name] else "       -"
        print(
            f"{name:22} {1e3 * median:9.1f} {step_tokens / median:10,.0f} {ratios[name]:11.3f} "
            f"{mfu} {peak} {graphs[name]:10d}"
        )
    batch = asked.cut(asked.sizes[0])
    distance, last = largest_distance(spec, asked.stream, batch, asked.compiled)
    print(
        f"losses of {UPDATES_COMPARED} updates, engine to challenge: at most {distance:.4f} nats "
        f"apart (the last is {last:.3f})"
    )
    row = {
        "profile": asked.profile, "how": how, "where": where, "torch": torch.__version__,
        "seconds": seconds, "ratio_to_challenge": ratios, "new_graphs": graphs,
        "peak_bytes": peak_bytes, "largest_distance_nats": distance,
    }  # fmt: skip
    (ROOT / "logs" / "train_step.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
