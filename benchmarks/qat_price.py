"""The price of QAT: whole training steps with it on and off, and the stall when it is switched on.

    .venv/bin/python benchmarks/qat_price.py [laptop|golf] [--gradients] [--compile] [--steps N]

Every arm has its own model and optimizers (this project's) and trains on random tokens; the arms
take their steps in turn, so that a noisy machine slows them alike. Table on stdout, JSON in
``logs/qat_price.json``; ratios hold on a noisy machine, times do not.

    off                  float weights
    int8 percentile ...  this project: weights snapped once a step, outside the model
    rd                   trained to 3 bits a weight: learned steps, and bits among the gradients
    rd, measuring        the same in the updates that measure bits anew, one in four
    torchao int8         IntxFakeQuantizer in every linear layer and the embedding, inside the model

    --gradients          instead: int4 in groups of 64 under every gradient rule, and with a teacher
                         of the same size

The second table (of grids) switches each arm on in the middle: extra time of the first two steps
with QAT on, in median steps, and new graphs of the compiler. ``golf`` is one GPU's share (1/8) of
the challenge's step and wants CUDA; ``laptop`` runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.budget.budget import Budget  # noqa: E402
from qat.budget.price_control import File, PriceControl  # noqa: E402
from qat.model.gpt import GPT  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.quantize.gradients import rule_kinds  # noqa: E402
from qat.quantize.grid import Grid  # noqa: E402
from qat.quantize.plan import build_plan  # noqa: E402
from qat.quantize.switch import QatSwitch  # noqa: E402
from qat.settings.machine import keep_freed_memory  # noqa: E402
from qat.settings.schema import OptimizerSettings  # noqa: E402
from qat.training.distill import Distillation, Teacher  # noqa: E402
from qat.training.optimizers import build_optimizers  # noqa: E402

PROFILES = {
    "tiny": (ModelSpec(512, 1, 16, 1, 1, 1, True), 1, 16),
    "laptop": (ModelSpec(1024, 4, 288, 6, 3, 2, True), 16, 256),  # shape, sequences, length
    "golf": (ModelSpec(1024, 9, 512, 8, 4, 2, True), 64, 1024),
}
GRIDS = {
    "int8 percentile": Grid(bits=8, scale_rule="percentile"),
    "int8_golf": Grid(
        bits=8, scale_rule="percentile", scale_floor=1 / 127, code_scale_dtype="fp32"
    ),
    "int6 amax": Grid(bits=6),
    "int4 g64": Grid(bits=4, group_size=64),
}
WARM_STEPS = 3
BITS_PER_WEIGHT = 3
PROBE_TOKENS = 256  # of the gradients that the first steps come from


class Arm:
    """One model in training; ``step`` takes one step and returns its seconds."""

    def __init__(self, shape: ModelSpec, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        self.gpt = GPT(shape).to(device)
        self.device = device
        self.masters = dict(self.gpt.named_parameters())
        self.optimizers = build_optimizers(self.gpt, OptimizerSettings(), [])
        self.loss: Callable[..., Tensor] = self._loss
        if compiled:
            self.loss = torch.compile(self._loss, fullgraph=True)

    def _loss(self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return torch.func.functional_call(self.gpt, weights, (ids, targets))

    def set_qat(self, is_on: bool) -> None:
        """From the next step on."""

    def weights(self) -> dict[str, Tensor]:
        return self.masters

    def before_update(self) -> None:
        """With the gradients of the loss in place."""

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        self._wait()
        started = time.perf_counter()
        self.loss(self.weights(), *batch).backward()
        self.before_update()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Ours(Arm):
    def __init__(
        self,
        shape: ModelSpec,
        device: torch.device,
        compiled: bool,
        grid: Grid | None,
        rule: str = "identity",
    ) -> None:
        super().__init__(shape, device, compiled)
        shapes = {name: tuple(p.shape) for name, p in self.masters.items()}
        rules = {"*.weight": "grid", "*": "fp32"}
        plan = build_plan(shapes, {"grid": grid or Grid(bits=8)}, rules)
        self.switch = QatSwitch(plan, rule, fused=compiled)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
        self.rates = {name: by_id[id(p)] for name, p in self.masters.items()}
        self.switch.refresh(self.masters, grid is not None)  # priming does the same
        self.is_on = False

    def set_qat(self, is_on: bool) -> None:
        self.is_on = is_on

    def weights(self) -> dict[str, Tensor]:
        self.switch.refresh(self.masters, self.is_on, progress=0.75)
        return self.switch.weights(self.masters)

    def before_update(self) -> None:
        self.switch.before_update(self.masters, self.rates, progress=0.75)


class Distilled(Ours):
    """With a teacher: what the model itself was when the arm was made."""

    def __init__(self, shape: ModelSpec, device: torch.device, compiled: bool, grid: Grid) -> None:
        super().__init__(shape, device, compiled, grid)
        teacher = Teacher(shape, {name: p.detach().clone() for name, p in self.masters.items()})
        self.distillation = Distillation(0.5, 1.0, self.gpt, shape if compiled else None, teacher)
        self.loss = self._distilled

    def _distilled(self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.distillation.loss(weights, ids, targets)


class Rated(Ours):
    """``qat=rd`` as TrainingLoop runs it, at the price of ``BITS_PER_WEIGHT``; no file is made."""

    def __init__(
        self, shape: ModelSpec, device: torch.device, compiled: bool, measures: bool
    ) -> None:
        grid = Grid(bits=8, scale_rule="learned", scale_dtype="bf16", column_scales=True)
        super().__init__(shape, device, compiled, grid)
        plan = self.switch.plan
        limit_bytes = sum(e.num_elements for e in plan.on_grid) * BITS_PER_WEIGHT // 8
        tokens = torch.randint(shape.vocab_size, (1, PROBE_TOKENS + 1), device=device)
        self.control = PriceControl(
            plan, Budget(limit_bytes), PROBE_TOKENS, lambda *_: File(0, 0.0), None
        )
        for master in self.masters.values():
            if not master.any():  # nothing starts at zero, which no gradient gets through
                torch.nn.init.normal_(master, std=0.02)
        self.gpt(tokens[:, :-1], tokens[:, 1:]).backward()
        self.control.observe(self.masters)
        self.gpt.zero_grad()
        found = self.control.first_scales(self.masters)
        self.switch.set_scales({name: steps.to(device) for name, steps in found.items()})
        self.control.is_adapted = False
        self.optimizers = build_optimizers(
            self.gpt, OptimizerSettings(learned_scale_lr=1e-5), list(self.switch.parameters())
        )
        self.measures = measures

    def before_update(self) -> None:
        if self.is_on:
            is_due = self.measures or not self.control.estimate.pulls
            self.control.updates = 0 if is_due else 1
            self.control.add_gradients(self.masters, self.switch.learned_scales)


class Torchao(Arm):
    """Fake quantizers as parametrisations of the model, as torchao's own layers apply them."""

    def __init__(self, shape: ModelSpec, device: torch.device, compiled: bool) -> None:
        super().__init__(shape, device, compiled=False)
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

        config = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
        self.quantizers = {
            name: IntxFakeQuantizer(config) for name in self.masters if name.endswith(".weight")
        }
        self.set_qat(False)
        if compiled:
            self.loss = torch.compile(self._quantized_loss, fullgraph=True)
        else:
            self.loss = self._quantized_loss

    def set_qat(self, is_on: bool) -> None:
        for quantizer in self.quantizers.values():
            quantizer.enabled = is_on

    def _quantized_loss(self, weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        quantized = {name: q(weights[name]) for name, q in self.quantizers.items()}
        return self._loss({**weights, **quantized}, ids, targets)


def gradient_arms(shape: ModelSpec, device: torch.device, compiled: bool) -> dict[str, Arm]:
    grid = GRIDS["int4 g64"]
    arms: dict[str, Arm] = {"off": Ours(shape, device, compiled, None)}
    for rule in rule_kinds():
        own = replace(grid, scale_rule="learned") if rule == "learned" else grid
        arms[rule] = Ours(shape, device, compiled, own, "identity" if rule == "learned" else rule)
    return arms | {"distilled": Distilled(shape, device, compiled, grid)}


def build_arms(shape: ModelSpec, device: torch.device, compiled: bool) -> dict[str, Arm]:
    arms: dict[str, Arm] = {"off": Ours(shape, device, compiled, None)}
    arms |= {name: Ours(shape, device, compiled, grid) for name, grid in GRIDS.items()}
    arms["rd"] = Rated(shape, device, compiled, measures=False)
    arms["rd, measuring"] = Rated(shape, device, compiled, measures=True)
    return arms | {"torchao int8": Torchao(shape, device, compiled)}


def prices(
    arms: dict[str, Arm], batch: tuple[Tensor, Tensor], steps: int
) -> dict[str, tuple[float, float]]:
    """(median seconds of a step, median over turns of its ratio to "off"), QAT on; by arm.

    A turn is two steps of every arm, the second one timed, so that each has warm caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for name, arm in arms.items():
        arm.set_qat(name != "off")
    names = list(arms)
    for turn in range(WARM_STEPS + steps):
        first = turn % len(names)  # who follows whom must not matter
        for name in names[first:] + names[:first]:
            arms[name].step(batch)
            taken = arms[name].step(batch)
            if turn >= WARM_STEPS:
                seconds[name].append(taken)
    median = statistics.median
    return {
        name: (median(times), median(a / b for a, b in zip(times, seconds["off"], strict=True)))
        for name, times in seconds.items()
    }


def stall(arm: Arm, batch: tuple[Tensor, Tensor], steps: int) -> tuple[float, int]:
    """(extra time of the first two steps with QAT on, in median steps; new graphs)."""
    arm.set_qat(False)
    before = [arm.step(batch) for _ in range(WARM_STEPS + steps)][WARM_STEPS:]
    graphs = counters["stats"]["unique_graphs"]
    arm.set_qat(True)
    first = [arm.step(batch) for _ in range(2)]
    new_graphs = counters["stats"]["unique_graphs"] - graphs
    after = [arm.step(batch) for _ in range(steps)]
    extra = sum(first) - 2 * statistics.median(after)
    return extra / statistics.median(before), new_graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", choices=PROFILES, default="laptop")
    parser.add_argument("--gradients", action="store_true", help="price rules, not grids")
    parser.add_argument("--compile", action="store_true", help="compile model and snapping")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()  # as train.py does
    torch._dynamo.config.recompile_limit = 64  # arms share the code of one function
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.profile == "golf" and device.type != "cuda":
        parser.error("golf wants CUDA; on a CPU take laptop")
    shape, sequences, length = PROFILES[asked.profile]
    ids = torch.randint(shape.vocab_size, (sequences, length + 1), device=device)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    make = gradient_arms if asked.gradients else build_arms
    measured = prices(make(shape, device, asked.compile), batch, asked.steps)
    how = "compiled" if asked.compile else "eager"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{asked.threads} threads"
    print(f"{asked.profile}, {how}, {device} ({where}), torch {torch.__version__}")
    print(f"{'arm':18} {'ms/step':>9} {'x off':>7}")
    for name, (seconds, ratio) in measured.items():
        print(f"{name:18} {1e3 * seconds:9.1f} {ratio:7.3f}")

    stalls = {}
    switched = [] if asked.gradients else [*GRIDS, "torchao int8"]
    if switched:
        print(f"\n{'switched on':18} {'stall in steps':>15} {'new graphs':>11}")
    for name in switched:
        torch._dynamo.reset()
        grid = GRIDS.get(name)
        arm = Ours(shape, device, asked.compile, grid) if grid else None
        stalls[name] = stall(arm or Torchao(shape, device, asked.compile), batch, asked.steps // 2)
        print(f"{name:18} {stalls[name][0]:15.2f} {stalls[name][1]:11d}")
    row = {"profile": asked.profile, "how": how, "where": where, "torch": torch.__version__,
           "seconds_and_ratio": measured, "stalls": stalls}  # fmt: skip
    (ROOT / "logs" / "qat_price.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
