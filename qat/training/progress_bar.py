"""A progress bar that shows what a wallclock run is about: the clock, the loss, the switch."""

from __future__ import annotations

import logging
import math

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qat.training.loop import TrainingLoop

log = logging.getLogger("qat")

LINES_PER_RUN = 10  # where there is no terminal to draw on


class ProgressBar(Callback):
    """On a terminal a bar, elsewhere about ten lines in the log. Rank 0 only."""

    def __init__(self, console: Console, tokens_per_byte: float) -> None:
        self._bits_per_nat_byte = tokens_per_byte / math.log(2)
        self._next_line = 1
        self._task: TaskID | None = None
        self._shown_step = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar.start()
            self._task = self._bar.add_task("priming", total=1.0, state="")

    def _state(self, module: TrainingLoop) -> str:
        p = module.progress
        bpb = p.train_loss * self._bits_per_nat_byte
        loss = "" if math.isnan(p.train_loss) else f" loss {p.train_loss:.4f} (~{bpb:.3f} bpb)"
        qat = "" if p.qat_first_step is None else f" QAT on since step {p.qat_first_step}"
        return f"step {p.step} {p.elapsed_seconds:.1f} s{loss}{qat}"

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingLoop)
        p = pl_module.progress
        if self._task is None or p.step == self._shown_step:
            return
        self._shown_step = p.step
        done = min(pl_module.done, 1.0)
        if self._bar.disable:
            if done * LINES_PER_RUN >= self._next_line:
                self._next_line = int(done * LINES_PER_RUN) + 1
                log.info("%3.0f %% %s", 100 * done, self._state(pl_module))
        else:
            self._bar.update(
                self._task, description="training", completed=done, state=self._state(pl_module)
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._bar.stop()
