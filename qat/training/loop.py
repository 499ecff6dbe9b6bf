"""The LightningModule: a step is forward and backward passes, an update, a look at the clock.

The model takes its weights as inputs of one (compiled) function, so the QAT switch changes data and
never the graph. Lightning's batches are micro-batches; steps are counted here, because
``trainer.global_step`` counts every optimizer of a step.

What else happens around updates (averaging, training to bytes, liveness, checkpoints) is hooks,
called in the order in which they are given. Lightning's own callbacks know batches, not updates.

The first ``warmup_steps`` steps prime caches and compilers: they are not timed, and weights,
optimizers, random state and data position are restored after them.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.compiled import compiled
from qat.errors import PreemptedError, TrainingError
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.qat_model import QatModel
from qat.settings import machine
from qat.settings.schema import OptimizerSettings
from qat.training.clock import TrainingClock
from qat.training.optimizers import build_optimizers, load_states, set_rates, states_by_name
from qat.training.schedule import Schedule

log = logging.getLogger("qat")
Batch = tuple[Tensor, Tensor]  # ids and targets (B, T)
LossFunction = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]  # of weights, ids and targets


@dataclass
class Progress:
    """Where a run is. ``qat_first_step`` is the number (from 1) of the first update with QAT on."""

    step: int = 0
    elapsed_seconds: float = 0.0
    train_loss: float = float("nan")
    qat_first_step: int | None = None
    qat_last_step: int | None = None
    qat_steps: int = 0


@dataclass(frozen=True)
class Pace:
    """How the loop takes its updates, whatever it trains."""

    micro_batches: int = 1  # forward passes of an update, on each rank
    warmup_steps: int = 1
    precision: str = "fp32"  # or bf16: autocast over float32 masters
    log_every_steps: int = 10


class UpdateHook:
    """Something that happens around updates. What is not said stays undone.

    ``state`` is saved with checkpoints under ``name``; ``load_state`` takes it up before ``prime``.
    """

    name = ""

    def prime(self, loop: TrainingLoop) -> None:
        """Before the first update, off the clock, on the device of the training."""

    def first_batch(self, loop: TrainingLoop, batch: Batch) -> None:
        """Before the first forward pass, off the clock."""

    def before_update(self, loop: TrainingLoop) -> None:
        """The gradients of the loss are in place."""

    def after_update(self, loop: TrainingLoop) -> None:
        """The masters have moved; ``loop.progress`` counts the update."""

    def before_next_update(self, loop: TrainingLoop) -> None:
        """There will be another update; the losses that are due are written."""

    def at_switch(self, loop: TrainingLoop) -> None:
        """The next update is the first with QAT on."""

    def at_qat_end(self, loop: TrainingLoop) -> None:
        """Off the clock, after the last update with QAT on; of a run without one, after its last.

        The switch still says what that update saw."""

    def after_last_update(self, loop: TrainingLoop) -> None:
        """On the clock."""

    def after_training(self, loop: TrainingLoop) -> None:
        """Off the clock: all is done and measured."""

    def state(self) -> dict[str, Any] | None:
        """Plain values and tensors, not copied."""
        return None

    def load_state(self, state: Mapping[str, Any], loop: TrainingLoop) -> None:
        """The inverse of ``state``; the loop's own state is loaded already."""


def loss_of(model: nn.Module) -> LossFunction:
    """The loss of a module of this kind; its own weights are not looked at."""

    def loss(weights: dict[str, Tensor], ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids_BT, targets_BT))

    return loss


def compiled_loss(spec: ModelSpec) -> LossFunction:
    """Of any model of this spec, shared by all runs of this process."""
    return compiled(("loss", spec), lambda: loss_of(empty_model(spec)))


class _Snapshot:
    """All that priming disturbs: weights, optimizers, gradient rule, scales, random state."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self._weights = {name: p.detach().clone() for name, p in loop.masters.items()}
        self._states = [copy.deepcopy(o.state_dict()) for o in loop.all_optimizers]
        self._scales = {n: s.detach().clone() for n, s in loop.switch.learned_scales.items()}
        self._of_rule = copy.deepcopy(loop.switch.gradient.state())
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._loop.masters.items():
            parameter.copy_(self._weights[name])
        for optimizer, state in zip(self._loop.all_optimizers, self._states, strict=True):
            optimizer.load_state_dict(state)
        self._loop.switch.set_scales(self._scales)
        self._loop.switch.gradient.load_state(self._of_rule)
        torch.set_rng_state(self._random)
        if self._cuda_random:
            torch.cuda.set_rng_state_all(self._cuda_random)


class _Losses:
    """Losses of the last steps, on the device until it is time: reading one waits for the GPU."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._losses: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, loss: Tensor, values: dict[str, float]) -> None:
        self._rows.append((step, values))
        self._losses.append(loss)

    def write(self, loggers: Sequence[Any]) -> float:
        """Give all to Lightning's loggers, averaged over ranks (a collective call); the last loss.

        TrainingError names the first step whose loss is not finite.
        """
        losses = torch.stack(self._losses).double()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        values = losses.tolist()
        for (step, row), loss in zip(self._rows, values, strict=True):
            for logger in loggers:
                logger.log_metrics({"train_loss": loss} | row, step=step)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"train loss is {loss} at step {step}; try lower learning rates"
                )
        self._rows.clear()
        self._losses.clear()
        return values[-1]


class TrainingLoop(LightningModule):
    """Trains ``model`` until ``schedule`` says stop.

    ``loss`` is that of the model's module, perhaps compiled (default: as it is); ``qat_loss`` takes
    its place while QAT is on (default: none does).
    """

    def __init__(
        self,
        model: QatModel,
        schedule: Schedule,
        optimizer_settings: OptimizerSettings,
        pace: Pace,
        hooks: Sequence[UpdateHook] = (),
        loss: LossFunction | None = None,
        qat_loss: LossFunction | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.schedule, self.pace, self.hooks = model, schedule, pace, list(hooks)
        self.switch, self.masters = model.switch, model.masters
        self.clock = TrainingClock()
        self.progress = Progress()
        self.step_seconds: float | None = None  # estimated after priming
        self.switched_at: float | None = None  # progress of the run at the switch
        self._optimizer_settings = optimizer_settings
        self._priming_left = pace.warmup_steps
        self._priming_seconds: list[float] = []
        self._micro_losses: list[Tensor] = []
        self._losses = _Losses()
        self._resumed_optimizers: dict[str, dict[str, Any]] = {}
        self._micro = 0
        self._is_first_batch = True
        self._loss = loss or loss_of(model.model)
        self._qat_loss = qat_loss or self._loss

    def loss(
        self, weights: dict[str, Tensor], ids_BT: Tensor, targets_BT: Tensor, is_on: bool = False
    ) -> Tensor:
        """Mean loss in nats of a model of these weights; ``is_on``: as it is trained with QAT."""
        # Around the compiled function, not in it: torch keeps no graph that enters autocast.
        enabled = self.pace.precision == "bf16"
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=enabled):
            function = self._qat_loss if is_on else self._loss
            return function(weights, ids_BT, targets_BT)

    @property
    def is_over(self) -> bool:
        return self.done >= 1.0

    @property
    def done(self) -> float:
        """Share of the run that is over."""
        p = self.progress
        return self.schedule.progress(p.step, p.elapsed_seconds, p.qat_steps)

    @property
    def done_since_switch(self) -> float:
        """Share of the time from the switch to the end."""
        start = self.switched_at
        return (self.done - start) / (1.0 - start) if start is not None and start < 1.0 else 1.0

    @property
    def is_priming(self) -> bool:
        return self._priming_left > 0

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings, scales = self._optimizer_settings, list(self.switch.parameters())
        self.all_optimizers = build_optimizers(self.model.model, settings, scales)
        return self.all_optimizers

    def on_train_start(self) -> None:
        load_states(self.all_optimizers, self._parameters_by_name(), self._resumed_optimizers)
        self._resumed_optimizers = {}
        for hook in self.hooks:
            hook.prime(self)
        if self.is_priming:
            self._before_priming = _Snapshot(self)
            if self.schedule.asks_for_qat:
                self._prime_qat()
        else:
            self._start_timing()
        self._step_started_at = time.perf_counter()

    def _prime_qat(self) -> None:
        """Twice, since a gradient rule has something to remember from the second time on."""
        self.model.qat(True).refresh()
        for _ in range(2):
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
            self._pull()
            self.model.refresh()
        for optimizer in self.all_optimizers:
            optimizer.zero_grad()

    def _pull(self) -> None:
        """What the gradient rule does beside the loss."""
        if self.switch.gradient.pulls:
            self.switch.before_update(self.masters, self._rates(), self.done_since_switch)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Only the last backward pass of a step exchanges gradients between ranks."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            last = self._micro == self.pace.micro_batches - 1
            self.trainer.model.require_backward_grad_sync = last

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.take(batch, self.manual_backward)

    def take(self, batch: Batch, backward: Callable[[Tensor], object]) -> None:
        """A micro-batch, and the update that it completes."""
        self.last_batch = batch
        if self._is_first_batch:
            self._is_first_batch = False
            self.clock.pause()
            for hook in self.hooks:
                hook.first_batch(self, batch)
            if not self.is_priming:
                self.clock.start()
        is_on = self.model.is_on and not self.is_priming
        loss = self.loss(self.model.weights(), *batch, is_on)
        backward(loss / self.pace.micro_batches)
        self._micro_losses.append(loss.detach())
        self._micro += 1
        if self._micro == self.pace.micro_batches:
            self._update()
            self._micro = 0

    def _update(self) -> None:
        p = self.progress
        rate = self.schedule.rate(p.step, p.elapsed_seconds, p.qat_steps)
        optimizers = self.all_optimizers
        set_rates(optimizers, rate, self.schedule.momentum(p.step))
        if not self.is_priming:
            for hook in self.hooks:
                hook.before_update(self)
        self._pull()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss = torch.stack(self._micro_losses).mean()
        self._micro_losses.clear()
        if self.is_priming:
            self._finish_priming_step()
        else:
            self._finish_step(rate, loss)

    def _rates(self) -> dict[str, float]:
        """Learning rate of every master, by name."""
        groups = [group for optimizer in self.all_optimizers for group in optimizer.param_groups]
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        return {name: rates[id(master)] for name, master in self.masters.items()}

    def _finish_priming_step(self) -> None:
        self.model.refresh()
        self._wait_for_device()
        now = time.perf_counter()
        self._priming_seconds.append(now - self._step_started_at)
        self._step_started_at = now
        self._priming_left -= 1
        if not self.is_priming:
            self._before_priming.restore()
            del self._before_priming
            if warm := self._priming_seconds[1:]:  # the first pays for compilation, cold caches
                self.step_seconds = statistics.median(warm)
            self._start_timing()

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _start_timing(self) -> None:
        self._wait_for_device()
        if (seconds := machine.seconds_since_start()) is not None:
            log.info("the clock starts, %.1f s after the command", seconds)
        self._switch_for_next_step()
        self.clock.start()
        self.progress.elapsed_seconds = self.clock.agree()

    def _switch_for_next_step(self) -> None:
        """Snap for the next update if QAT is on by then, and still on."""
        p, s = self.progress, self.schedule
        if self.switched_at is None and s.qat_starts(p.step, p.elapsed_seconds):
            self.switched_at = self.done
            # Scales had gradients of zero so far, as DDP waits for every parameter: they start now.
            for optimizer in self.all_optimizers:
                for scale in self.switch.parameters():
                    optimizer.state.pop(scale, None)
            for hook in self.hooks:
                hook.at_switch(self)
        self.model.qat(self.switched_at is not None and not s.qat_stopped(p.step))
        self.refresh()

    def refresh(self) -> None:
        """Snap as the next update would see it."""
        p = self.progress
        self.model.refresh(p.step, self.done_since_switch, self.schedule.blend(p.qat_steps))

    def _finish_step(self, rate: float, loss: Tensor) -> None:
        p = self.progress
        p.step += 1
        if self.model.is_on:
            p.qat_steps += 1
            p.qat_last_step = p.step
            if p.qat_first_step is None:
                p.qat_first_step = p.step
                log.info("QAT on since step %d (%.1f s)", p.step, p.elapsed_seconds)
        self._wait_for_previous_step()
        p.elapsed_seconds = self.clock.agree()
        qat_on = int(self.model.is_on)
        values = {"elapsed_seconds": p.elapsed_seconds, "rate": rate, "qat_on": qat_on}
        self._losses.add(p.step, loss, values)
        for hook in self.hooks:
            hook.after_update(self)
        if self.is_over:
            self._finish_training()
            return
        if self.model.is_on and self.schedule.qat_stopped(p.step):
            self.clock.pause()
            for hook in self.hooks:
                hook.at_qat_end(self)
            self.switch.set_scales({})  # the weights move on without them
            self.clock.start()
        if len(self._losses) >= self.pace.log_every_steps:
            self.write_losses()
        for hook in self.hooks:
            hook.before_next_update(self)
        if self.clock.stop_agreed:
            raise PreemptedError(self.clock.stop_agreed, f"after step {p.step}")
        self._switch_for_next_step()

    def write_losses(self) -> None:
        if len(self._losses):
            self.progress.train_loss = self._losses.write(self.loggers)

    def _wait_for_previous_step(self) -> None:
        """Keep the host at most one step ahead of a GPU, so the clock sees what was really done."""
        if self.device.type != "cuda":
            return
        if previous := getattr(self, "_step_done", None):
            previous.synchronize()
        self._step_done = torch.cuda.Event()
        self._step_done.record()

    def _finish_training(self) -> None:
        self._wait_for_device()
        for hook in self.hooks:
            hook.after_last_update(self)
        p = self.progress
        p.elapsed_seconds = self.clock.agree()
        self.clock.pause()
        self.write_losses()
        if self.model.is_on or not p.qat_steps:
            for hook in self.hooks:
                hook.at_qat_end(self)
        for hook in self.hooks:
            hook.after_training(self)
        self.trainer.should_stop = True

    def _parameters_by_name(self) -> Mapping[str, Tensor]:
        scales = {f"scale of {name}": scale for name, scale in self.switch.named_parameters()}
        return self.masters | scales

    def state(self) -> dict[str, Any]:
        """What another process needs to go on with the same bits; tensors are not copied."""
        return {
            "weights": {name: p.detach() for name, p in self.masters.items()},
            "optimizers": states_by_name(self.all_optimizers, self._parameters_by_name()),
            "learned_scales": {n: s.detach() for n, s in self.switch.learned_scales.items()},
            "gradient_rule": self.switch.gradient.state(),
            "progress": asdict(self.progress),
            "switched_at": self.switched_at,
        } | {hook.name: hook.state() for hook in self.hooks if hook.name}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state`` at the next ``fit``; optimizers take theirs up when it starts."""
        for name, parameter in self.masters.items():
            parameter.copy_(state["weights"][name])
        self._resumed_optimizers = state["optimizers"]
        self.switch.set_scales(state["learned_scales"])
        self.switch.gradient.load_state(state["gradient_rule"])
        self.progress = Progress(**state["progress"])
        self.clock = TrainingClock(self.progress.elapsed_seconds)
        self.switched_at = state["switched_at"]
        for hook in self.hooks:
            if state.get(hook.name) is not None:
                hook.load_state(state[hook.name], self)
