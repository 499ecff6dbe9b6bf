"""The LightningModule: a step is forward and backward passes, an update, a look at the clock.

The model takes its weights as inputs of one (compiled) function, so the QAT switch changes data and
never the graph. Lightning's batches are micro-batches; steps are counted here, because
``trainer.global_step`` counts every optimizer of a step.

The first ``warmup_steps`` steps prime caches and compilers: they are not timed, and weights,
optimizers, random state and data position are restored after them.
"""

from __future__ import annotations

import logging
import statistics
import time

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.budget.price_control import PriceControl
from qat.errors import PreemptedError
from qat.quantize.switch import QatSwitch
from qat.training.averaging import Averaging
from qat.training.clock import TrainingClock
from qat.training.liveness import (
    GradientLiveness,
    check_all_seen,
    check_graph_uses,
    measure_gradients,
    measure_on_grid_share,
)
from qat.training.metrics import PendingMetrics
from qat.training.module_state import state_of
from qat.training.optimizers import build_optimizers, set_rates
from qat.training.priming import Snapshot
from qat.training.progress import Checkpointing, Progress
from qat.training.schedule import Schedule

log = logging.getLogger("qat")

PROBE_TOKENS = 8  # of the forward pass that checks which weights a model uses


class QatModule(LightningModule):
    """Trains ``gpt`` on ``micro_batches`` batches per update until ``schedule`` says stop."""

    def __init__(
        self,
        gpt: nn.Module,
        switch: QatSwitch,
        schedule: Schedule,
        optimizer_settings,
        micro_batches: int,
        warmup_steps: int,
        precision: str,
        compile_model: bool,
        log_every_steps: int,
        checkpointing: Checkpointing,
        averaging: Averaging,
        price_control: PriceControl | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gpt = gpt
        self.masters = dict(gpt.named_parameters())
        self.schedule = schedule
        self.switch = switch
        self.clock = TrainingClock()
        self.progress = Progress()
        self.step_seconds: float | None = None  # estimated after priming
        self.on_grid_share = float("nan")  # by a forward pass in the state of the last QAT update
        self.gradients: GradientLiveness | None = None  # likewise
        self._optimizer_settings = optimizer_settings
        self._micro_batches = micro_batches
        self._priming_left = warmup_steps
        self._priming_seconds: list[float] = []
        self._log_every_steps = log_every_steps
        self._micro_losses: list[Tensor] = []
        self._metrics = PendingMetrics()
        self.checkpointing, self.averaging = checkpointing, averaging
        self.price_control = price_control
        self.resumed_optimizers: list[dict] = []
        self._micro = 0
        self._graph_checked = False
        self.switched_at: float | None = None  # progress of the run at the switch
        self._precision = precision
        if compile_model:
            torch.compiler.reset()  # graphs of earlier runs of a sweep count against a limit
        self.loss = torch.compile(self._loss, fullgraph=True) if compile_model else self._loss

    def _loss(self, weights: dict[str, Tensor], ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        enabled = self._precision == "bf16"
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=enabled):
            return torch.func.functional_call(self.gpt, weights, (ids_BT, targets_BT))

    @property
    def is_over(self) -> bool:
        p = self.progress
        return self.schedule.progress(p.step, p.elapsed_seconds) >= 1.0

    @property
    def is_priming(self) -> bool:
        return self._priming_left > 0

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        learned_scales = list(self.switch.parameters())
        return build_optimizers(self.gpt, self._optimizer_settings, learned_scales)

    def on_train_start(self) -> None:
        for optimizer, state in zip(self.trainer.optimizers, self.resumed_optimizers, strict=False):
            optimizer.load_state_dict(state)
        if self.price_control is not None:
            self.price_control.prime(self.masters)
        probe = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        check_all_seen(self.gpt, self.switch.plan.snap(self.masters), probe)
        if self.is_priming:
            self._before_priming = Snapshot(self.masters, self.trainer.optimizers, self.switch)
            if self.schedule.asks_for_qat:
                self.switch.refresh(self.masters, True)  # primes the snapping
        else:
            self._start_timing()
        self._step_started_at = time.perf_counter()

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Only the last backward pass of a step exchanges gradients between ranks."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            last = self._micro == self._micro_batches - 1
            self.trainer.model.require_backward_grad_sync = last

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._last_batch = batch
        if not self._graph_checked:
            self._check_graph(batch)
        loss = self.loss(self.switch.weights(self.masters), *batch)
        self.manual_backward(loss / self._micro_batches)
        self._micro_losses.append(loss.detach())
        self._micro += 1
        if self._micro == self._micro_batches:
            self._update()
            self._micro = 0

    def _check_graph(self, batch: tuple[Tensor, Tensor]) -> None:
        """Once, off the clock: the (compiled) step really works on the weights it is handed."""
        self.clock.pause()
        weights = self.switch.weights(self.masters)
        check_graph_uses(self.loss(weights, *batch), weights)
        self._graph_checked = True
        if not self.is_priming:
            self.clock.start()

    def _update(self) -> None:
        p = self.progress
        rate = self.schedule.rate(p.step, p.elapsed_seconds)
        optimizers = self.trainer.optimizers
        set_rates(optimizers, rate, self.schedule.momentum(p.step))
        self._weigh_bits()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss = torch.stack(self._micro_losses).mean()
        self._micro_losses.clear()
        if self.is_priming:
            self._finish_priming_step()
        else:
            self._finish_step(rate, loss)

    def _weigh_bits(self) -> None:
        """The loss's gradients are in place: add those of the bits, or before the switch learn
        from them."""
        if self.price_control is None or self.is_priming:
            return
        if self.switch.is_on:
            self.price_control.add_gradients(self.masters, self.switch.learned_scales)
        else:
            self.price_control.observe(self.masters)

    def _finish_priming_step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
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

    def _start_timing(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        p = self.progress
        self._switch_for_next_step()
        self.clock.start()
        p.elapsed_seconds = self.clock.agree()

    def _switch_for_next_step(self) -> None:
        """Snap for the next update if QAT is on by then, and still on."""
        p, s = self.progress, self.schedule
        if self.switched_at is None and s.qat_starts(p.step, p.elapsed_seconds):
            self.switched_at = s.progress(p.step, p.elapsed_seconds)
            if self.price_control is not None:
                self.switch.set_scales(self.price_control.first_scales(self.masters))
                self.schedule = s.shortened(self.price_control.kept_seconds)
        self._refresh(self.switched_at is not None and not s.qat_stopped(p.step))

    @property
    def _done_since_switch(self) -> float:
        """Share of the time from the switch to the end."""
        p, start = self.progress, self.switched_at
        now = self.schedule.progress(p.step, p.elapsed_seconds)
        return (now - start) / (1.0 - start) if start is not None and start < 1.0 else 1.0

    def _refresh(self, is_on: bool) -> None:
        p = self.progress
        blend = self.schedule.blend(p.qat_steps)
        self.switch.refresh(self.masters, is_on, p.step, self._done_since_switch, blend)

    def _finish_step(self, rate: float, loss: Tensor) -> None:
        p = self.progress
        p.step += 1
        if self.switch.is_on:
            p.qat_steps += 1
            p.qat_last_step = p.step
            if p.qat_first_step is None:
                p.qat_first_step = p.step
                log.info("QAT on since step %d (%.1f s)", p.step, p.elapsed_seconds)
        self._wait_for_previous_step()
        p.elapsed_seconds = self.clock.agree()
        if self.averaging.is_due(p.step, self.schedule.progress(p.step, p.elapsed_seconds)):
            self.averaging.add(self.masters, self.switch)
        qat_on = int(self.switch.is_on)
        values = {"elapsed_seconds": p.elapsed_seconds, "rate": rate, "qat_on": qat_on}
        self._metrics.add(p.step, loss, values)
        if self.is_over:
            self._finish_training()
            return
        if self.price_control is not None and self.switch.is_on:
            scales = self.switch.learned_scales
            self.price_control.follow(self.masters, scales, self._done_since_switch)
        if self.switch.is_on and self.schedule.qat_stopped(p.step):
            self.clock.pause()
            self._measure_liveness()
            self.switch.set_scales({})  # the weights move on without them
            self.clock.start()
        if len(self._metrics) >= self._log_every_steps:
            p.train_loss = self._metrics.write(self.loggers)
        if self.clock.stop_agreed or self.checkpointing.is_due(p.step, p.elapsed_seconds):
            self._save()
        if self.clock.stop_agreed:
            raise PreemptedError(f"stopped after step {p.step}")
        self._switch_for_next_step()

    def _save(self) -> None:
        """Off the clock."""
        self.clock.pause()
        if len(self._metrics):
            self.progress.train_loss = self._metrics.write(self.loggers)
        self.checkpointing.write(state_of(self))
        self.checkpointing.last_seconds = self.progress.elapsed_seconds
        self.clock.start()

    def _wait_for_previous_step(self) -> None:
        """Keep the host at most one step ahead of a GPU, so the clock sees what was really done."""
        if self.device.type != "cuda":
            return
        if previous := getattr(self, "_step_done", None):
            previous.synchronize()
        self._step_done = torch.cuda.Event()
        self._step_done.record()

    def _finish_training(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        p = self.progress
        if self.price_control is not None and self.switch.is_on:
            self.price_control.land(self.masters, self.switch.learned_scales)
        p.elapsed_seconds = self.clock.agree()
        self.clock.pause()
        p.train_loss = self._metrics.write(self.loggers)
        if not p.qat_steps or self.switch.is_on:  # else it was measured when QAT stopped
            self._measure_liveness()
        self.checkpointing.write(state_of(self))
        self.trainer.should_stop = True

    def _measure_liveness(self) -> None:
        """What one more update like the last would see: weights on the grid, gradients."""
        self._refresh(self.switch.is_on)
        weights = self.switch.weights(self.masters)
        probe = self._last_batch[0][:1]
        self.on_grid_share = measure_on_grid_share(self.gpt, weights, self.switch, probe)
        loss = self.loss(weights, *self._last_batch)
        self.gradients = measure_gradients(loss, self.masters, self.switch.plan)
