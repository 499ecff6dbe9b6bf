"""Lightning around a training loop: its Trainer, its callbacks, and what came of it."""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader

from qat.budget.budget import Budget
from qat.budget.price_control import File, PriceControl, Tensors
from qat.errors import TrainingError, UserError
from qat.qat_model import QatModel
from qat.quantize.plan import Plan
from qat.settings import machine
from qat.settings.checks import micro_batches
from qat.settings.schema import TrainSettings
from qat.settings.signals import stop_now, when_asked_to_stop
from qat.text.batches import BatchShape, TrainingBatches
from qat.text.shards import TokenStream
from qat.training.build import build_schedule, gradient_of, spec_of
from qat.training.distill import Distillation, Teacher
from qat.training.loop import Batch, Pace, TrainingLoop, UpdateHook, compiled_loss
from qat.training.schedule import Schedule

log = logging.getLogger("qat")

# Advice that does not apply here: batches are slices of a memory map, the folder is ours.
SAID_SECONDS = 10.0  # of scoring; less is not worth a line
TELLING_TOKENS = 1_024  # of a forward pass; with fewer its time is not that of its tokens
LIGHTNING_NOISE = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


@dataclass(frozen=True)
class Outcome:
    """What training did; the last masters are in the model it was given."""

    steps: int
    tokens: int
    train_seconds: float
    train_loss: float
    peak_memory_bytes: int
    qat_first_step: int | None
    qat_last_step: int | None
    qat_steps: int


def peak_memory_bytes() -> int:
    """Of this process so far: allocated on its GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kB here


class Forecast(Callback):
    """As soon as the step time is known: will QAT start, will the file fit, how long is scoring?

    ``scored_tokens``: in all scores that will be made.
    """

    def __init__(self, plan: Plan, budget: Budget | None, scored_tokens: int) -> None:
        self.plan, self.budget, self.scored_tokens = plan, budget, scored_tokens
        self.said = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingLoop)
        p = pl_module.progress
        if pl_module.step_seconds is None and p.step >= 2:  # no priming steps were asked for
            pl_module.step_seconds = p.elapsed_seconds / p.step
        if self.said or pl_module.step_seconds is None or not trainer.is_global_zero:
            return
        self.said = True
        forecast(pl_module.schedule, pl_module.step_seconds, self.plan, self.budget)
        batch_tokens = batch[0].numel() * pl_module.pace.micro_batches * trainer.world_size
        # A forward pass is a third of an update.
        seconds = pl_module.step_seconds / 3 * self.scored_tokens / batch_tokens
        # Of smaller passes nothing is said here; the scorer times its own.
        if seconds > SAID_SECONDS and batch[0].numel() >= TELLING_TOKENS:
            told = "scoring afterwards: about %.0f s (%s tokens; fewer: eval.max_tokens)"
            log.info(told, seconds, f"{self.scored_tokens:,}")


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


def build_trainer(loggers: list[Logger], callbacks: list[Callback]) -> Trainer:
    """A Trainer on this process's device, one of several ranks if torchrun started them."""
    for message in LIGHTNING_NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    local_ranks, world_size = machine.local_world_size(), machine.world_size()
    environment = TorchElasticEnvironment if machine.is_launched() else LightningEnvironment
    return Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local_ranks,
        num_nodes=world_size // local_ranks,
        strategy="ddp" if world_size > 1 else "auto",
        plugins=[environment()],
        precision="32-true",  # autocast is ours, around the model only
        max_epochs=1,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class StopAtSignal(Callback):
    """Asked to stop (a preempted job), the step ends; then all ranks stop, with a checkpoint.

    While priming there is nothing to save.
    """

    def __init__(self) -> None:
        self._heard = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingLoop)

        def request_stop(signum: int, frame: object) -> None:
            pl_module.clock.stop_requested = signum
            if pl_module.is_priming:
                stop_now(signum)

        self._heard.enter_context(when_asked_to_stop(request_stop))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heard.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._heard.close()


def build_loop(
    s: TrainSettings,
    module: nn.Module,
    plan: Plan,
    hooks: Sequence[UpdateHook],
    teacher: Teacher | None = None,
) -> TrainingLoop:
    """A loop that trains the module as the settings say; ``teacher``: None = itself, if any."""
    is_compiled = s.compile == "true"
    model = QatModel(module, plan, gradient_of(s.qat), s.seed, fused=is_compiled)
    pace = Pace(micro_batches(s), s.schedule.warmup_steps, s.precision, s.logger.every_steps)
    spec = spec_of(s.model) if is_compiled else None
    loss = None if spec is None else compiled_loss(spec)
    qat_loss, d = None, s.qat.distill
    if s.qat.enabled and d.weight:
        distillation = Distillation(d.weight, d.temperature, module, spec, teacher)
        hooks, qat_loss = [*hooks, distillation], distillation.loss
    return TrainingLoop(model, build_schedule(s), s.optimizer, pace, hooks, loss, qat_loss)


def price_control(
    s: TrainSettings,
    plan: Plan,
    budget: Budget,
    file_bytes: Callable[[Tensors, Tensors], int],
    trainer: Trainer,
) -> PriceControl | None:
    """Of a run that is trained to bytes; None for others. ``file_bytes`` encodes on rank 0."""
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

    return PriceControl(plan, budget, s.batch_tokens, encode_file, s.qat.bit_price)


def fit(
    loop: TrainingLoop,
    stream: TokenStream,
    shape: BatchShape,
    trainer: Trainer,
    state: Mapping[str, Any] | None,
) -> Outcome:
    """Train the loop's model in place, from ``state`` if there is one, and say what happened.

    TrainingError if a loss is not finite or the disk is full; PreemptedError after a signal.
    """
    if state is not None:
        try:
            loop.load_state(state)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint is of another version of this program ({error}); start a new run"
            ) from None
        log.info("going on after step %d", loop.progress.step)
    if loop.is_over:  # it was stopped after its last update
        trainer.strategy.setup_environment()
    else:
        batches = TrainingBatches(
            stream, shape, trainer.global_rank, loop.pace.warmup_steps, loop.progress.step
        )
        on_gpu = trainer.strategy.root_device.type == "cuda"  # a step must never wait for a disk
        loader = DataLoader(batches, batch_size=None, num_workers=int(on_gpu), pin_memory=on_gpu)
        trainer.fit(loop, loader)
    p = loop.progress
    return Outcome(
        steps=p.step,
        tokens=p.step * shape.batch_tokens,
        train_seconds=p.elapsed_seconds,
        train_loss=p.train_loss,
        peak_memory_bytes=peak_memory_bytes(),
        qat_first_step=p.qat_first_step,
        qat_last_step=p.qat_last_step,
        qat_steps=p.qat_steps,
    )
