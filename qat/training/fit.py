"""One training run: build the Trainer, fit until the clock says stop, say what happened."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader

from qat.budget.budget import Budget
from qat.budget.price_control import File, PriceControl, Tensors
from qat.errors import TrainingError
from qat.quantize.plan import Plan
from qat.text.batches import BatchShape, TrainingBatches
from qat.text.shards import TokenStream
from qat.training.averaging import Averaging
from qat.training.build import switch_of
from qat.training.checkpoint import save_checkpoint
from qat.training.liveness import GradientLiveness
from qat.training.module import QatModule
from qat.training.module_state import resume
from qat.training.progress import Checkpointing
from qat.training.schedule import Schedule

if TYPE_CHECKING:
    from qat.settings.schema import TrainSettings

log = logging.getLogger("qat")

# Advice that does not apply here: batches are slices of a memory map, the folder is ours.
LIGHTNING_NOISE = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


@dataclass(frozen=True)
class Outcome:
    """What training did; the last masters are in the model it was given.

    ``average`` holds averaged weights and learned scales where averaging was asked for.
    """

    steps: int
    tokens: int
    train_seconds: float
    train_loss: float
    peak_memory_bytes: int
    qat_first_step: int | None
    qat_last_step: int | None
    qat_steps: int
    on_grid_share: float
    gradients: GradientLiveness
    learned_scales: dict[str, torch.Tensor]
    average: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None


def peak_memory_bytes() -> int:
    """Of this process so far: allocated on its GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kB here


class Forecast(Callback):
    """As soon as the step time is known: will QAT start, will the file fit?"""

    def __init__(self, plan: Plan, budget: Budget | None) -> None:
        self.plan, self.budget = plan, budget
        self.said = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, QatModule)
        p = pl_module.progress
        if pl_module.step_seconds is None and p.step >= 2:  # no priming steps were asked for
            pl_module.step_seconds = p.elapsed_seconds / p.step
        if self.said or pl_module.step_seconds is None or not trainer.is_global_zero:
            return
        self.said = True
        forecast(pl_module.schedule, pl_module.step_seconds, self.plan, self.budget)


def forecast(schedule: Schedule, step_seconds: float, plan: Plan, budget: Budget | None) -> None:
    """Log the estimated last step and size, and warn about a QAT start or a size out of reach.

    ``budget`` None: the plan will be made to fit.
    """
    last = schedule.last_step(step_seconds)
    log.info("%.0f ms/step: about %d steps", 1000 * step_seconds, last)
    if schedule.asks_for_qat and not schedule.qat_starts(last - 1, (last - 1) * step_seconds):
        log.warning(
            "%s: the run ends at about step %d, so QAT WILL NEVER START; "
            "try qat.start_step=%d or qat.start_fraction=0.5",
            schedule.typed_start,
            last,
            last // 2,
        )
    if budget is None:
        return
    packed = plan.packed_bytes
    log.info("predicted artifact: %s bytes before entropy coding", f"{packed:,}")
    if not budget.holds(packed):
        log.warning(
            "limit_bytes = %s: the plan packs to %s bytes and the code is %s; "
            "take a smaller model or a coarser grid",
            f"{budget.limit_bytes:,}",
            f"{packed:,}",
            f"{budget.code_bytes:,}",
        )


def build_schedule(s: TrainSettings) -> Schedule:
    return Schedule(
        budget_seconds=s.budget_seconds,
        max_steps=s.max_steps,
        warmdown_steps=s.schedule.warmdown_steps,
        warmdown_fraction=s.schedule.warmdown_fraction,
        floor=s.schedule.floor,
        momentum_start=s.optimizer.momentum_start,
        momentum_end=s.optimizer.momentum,
        momentum_warmup_steps=s.optimizer.momentum_warmup_steps,
        start_step=s.qat.start_step if s.qat.enabled else None,
        start_fraction=s.qat.start_fraction if s.qat.enabled else None,
        start_lr_scale=s.qat.start_lr_scale if s.qat.enabled else None,
        stop_step=s.qat.stop_step,
        ramp_steps=s.qat.ramp_steps,
    )


def build_trainer(loggers: list[Logger], callbacks: list[Callback]) -> Trainer:
    """A Trainer on this process's device, one of several ranks if torchrun started them."""
    for message in LIGHTNING_NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local_ranks,
        num_nodes=world_size // local_ranks,
        strategy="ddp" if world_size > 1 else "auto",
        plugins=[TorchElasticEnvironment() if under_torchrun else LightningEnvironment()],
        precision="32-true",  # autocast is ours, around the model only
        max_epochs=1,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class StopAtSigterm(Callback):
    """SIGTERM (a preempted job) lets the step end; then all ranks stop, with a checkpoint."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, QatModule)
        clock = pl_module.clock

        def request_stop(signum: int, frame: object) -> None:
            clock.stop_requested = True

        self._before = signal.signal(signal.SIGTERM, request_stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)


def _price_control(
    s: TrainSettings,
    plan: Plan,
    budget: Budget,
    batch_tokens: int,
    file_bytes: Callable[[Tensors, Tensors], int],
    trainer: Trainer,
) -> PriceControl | None:
    if not (s.qat.enabled and s.qat.to_bytes) or s.qat.bit_price == 0.0:
        return None

    def encode_file(masters: Tensors, scales: Tensors) -> File:
        started = time.perf_counter()
        try:
            num_bytes = file_bytes(masters, scales) if trainer.is_global_zero else 0
        except ValueError as error:
            raise TrainingError(
                f"cannot encode: {error}; if training diverged, lower the learning rates"
            ) from None
        return trainer.strategy.broadcast(File(num_bytes, time.perf_counter() - started))

    return PriceControl(plan, budget, batch_tokens, encode_file, s.qat.bit_price)


def fit(
    s: TrainSettings,
    gpt: nn.Module,
    plan: Plan,
    budget: Budget,
    stream: TokenStream,
    shape: BatchShape,
    trainer: Trainer,
    checkpoint: Path,
    state: dict[str, Any] | None,
    file_bytes: Callable[[Tensors, Tensors], int],
) -> Outcome:
    """Train ``gpt`` in place, from ``state`` if there is one, and say what happened.

    Rank 0 writes ``checkpoint`` now and then, and at the end. ``file_bytes`` encodes masters and
    learned scales, for a run that is trained to a number of bytes. TrainingError if a loss is not
    finite or the disk is full; PreemptedError after SIGTERM.
    """

    def write(state: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            save_checkpoint(checkpoint, state)

    module = QatModule(
        gpt,
        switch_of(plan, s.qat, s.seed, fused=s.compile == "true"),
        build_schedule(s),
        s.optimizer,
        shape.micro_batches,
        s.schedule.warmup_steps,
        s.precision,
        s.compile == "true",
        s.logger.every_steps,
        Checkpointing(write, s.checkpoint.every_steps, s.checkpoint.every_seconds),
        Averaging(**vars(s.averaging)),
        _price_control(s, plan, budget, shape.batch_tokens, file_bytes, trainer),
    )
    if state is not None:
        resume(module, state)
        log.info("going on after step %d", module.progress.step)
    if module.is_over:  # it was stopped after its last update; ranks still have to meet
        trainer.strategy.setup_environment()
    else:
        first_step = module.progress.step
        batches = TrainingBatches(
            stream, shape, trainer.global_rank, s.schedule.warmup_steps, first_step
        )
        on_gpu = trainer.strategy.root_device.type == "cuda"  # a step must never wait for a disk
        loader = DataLoader(batches, batch_size=None, num_workers=int(on_gpu), pin_memory=on_gpu)
        trainer.fit(module, loader)
    p, mean = module.progress, module.averaging
    learned_scales = {name: w.detach() for name, w in module.switch.learned_scales.items()}
    assert module.gradients is not None
    return Outcome(
        steps=p.step,
        tokens=p.step * shape.batch_tokens,
        train_seconds=p.elapsed_seconds,
        train_loss=p.train_loss,
        peak_memory_bytes=peak_memory_bytes(),
        qat_first_step=p.qat_first_step,
        qat_last_step=p.qat_last_step,
        qat_steps=p.qat_steps,
        on_grid_share=module.on_grid_share,
        gradients=module.gradients,
        learned_scales=learned_scales,
        average=(mean.weights.tensors, mean.learned_scales.tensors if learned_scales else {})
        if mean.weights.count
        else None,
    )
