"""The life of one run as its folder tells it: started, then finished, oversize or failed.

``metrics.csv`` gets a row per step, appended; a resumed run goes on where its checkpoint was. Only
rank 0 claims a folder, writes and speaks; the other ranks go through the same calls in silence.
"""

from __future__ import annotations

import csv
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.text import Text

from qat.budget.fill import stored_label
from qat.errors import TrainingError, UserError
from qat.evaluation.score import Score
from qat.runs import provenance, run_folder
from qat.runs.fork import forked_state, scores_alike, trunk_folder
from qat.runs.result import Result, row_of
from qat.runs.run_folder import read_metrics, write_atomically
from qat.runs.storing import Export
from qat.runs.tables import plan_table, print_table
from qat.settings import machine
from qat.settings.schema import TrainSettings, as_yaml
from qat.text.shards import TokenStream
from qat.text.source import Source, absolute_paths
from qat.text.tokenizer import Tokenizer
from qat.training import val_curve
from qat.training.build import plan_of, spec_of
from qat.training.fit import Outcome
from qat.training.liveness import LivenessProof
from qat.training.val_curve import ValidationCurve

if TYPE_CHECKING:
    from qat.settings.command_line import Job

log = logging.getLogger("qat")
COLUMNS = ("step", "train_loss", "elapsed_seconds", "rate", "qat_on")


class MetricsFile(Logger):
    """Keeps the rows up to ``first_step`` of an earlier process, or else those that ``trunk``
    holds, and appends to them."""

    def __init__(
        self,
        path: Path,
        first_step: int = 0,
        columns: Sequence[str] = COLUMNS,
        trunk: Path | None = None,
    ) -> None:
        super().__init__()
        self._path, self._columns = path, columns
        kept, source = [], path if path.is_file() else trunk
        if source is not None and source.is_file():
            kept = [row for row in read_metrics(source) if int(row["step"]) <= first_step]
        lines = [",".join(columns), *(",".join(row[key] for key in columns) for row in kept)]
        write_atomically(path, "\n".join(lines) + "\n")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """TrainingError if the row cannot be written."""
        try:
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow({"step": step, **metrics})
        except OSError as error:
            raise TrainingError(f"cannot write {self._path}: {error.strerror}") from None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings are in the run's config.yaml."""


OVERSIZE_EXIT_CODE = 3


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bar; warnings and errors in red."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "bold red" if record.levelno >= logging.WARNING else ""
        self.console.print(Text(self.format(record), style=style), soft_wrap=True)


class TrainingRun:
    """Folder, log, loggers and row of one run."""

    def __init__(self, s: TrainSettings, job: Job) -> None:
        self.settings, self.job = s, job
        self.spec = spec_of(s.model)
        self.plan = plan_of(self.spec, s.grid, s.plan)
        self.speaks = machine.rank() == 0
        self.folder: Path | None = None
        self._trunk: Path | None = None  # folder of the run that this one goes on from
        self._lock: FileLock | None = None
        self._wandb: Any = None  # a run of W&B that is open
        self.console = Console(stderr=True, quiet=not self.speaks)
        self._handlers: list[logging.Handler] = [_ConsoleHandler(self.console)]
        log.handlers[:] = self._handlers
        log.setLevel(logging.INFO)
        log.disabled = False  # Hydra disables loggers that it did not configure
        log.propagate = False
        self.row = Result(
            run_name="",
            status="failed",
            exit_code=1,
            error=None,
            arm=job.choices.get("arm"),
            seed=s.seed,
            profile=s.profile,
            qat=str(job.choices["qat"]),
            grid=stored_label(self.plan, s.artifact),
            hardware=provenance.hardware(machine.world_size()),
            commit=provenance.commit(),
            data=None,
            limit_bytes=s.limit_bytes,
            storing_code=provenance.storing_code(),
            forked_from=Path(s.fork.run).name if s.fork.run else None,
            forked_steps=s.fork.step,
            settings=asdict(s) | {"data": asdict(absolute_paths(s.data))},
        )

    def _claim(self) -> None:
        """Take a folder of our own and say in it what this run is."""
        s = self.settings
        time_name = time.strftime("%Y%m%d-%H%M%S")
        default = f"{time_name}_{self.row.qat}_{self.row.grid}_s{s.seed}"
        parent = self.job.sweep_dir or Path(s.runs_dir)
        if s.resume is not None:
            self.folder = Path(s.resume)
            self._lock = run_folder.lock(self.folder)
        else:
            asked, choices = self.job.overrides, self.job.choices
            yaml = as_yaml(replace(s, data=absolute_paths(s.data)))

            def describe(folder: Path) -> None:
                run_folder.describe(folder, yaml, asked, choices, machine.world_size())
                self._lock = run_folder.lock(folder, f"runs_dir={parent}")

            self.folder = run_folder.claim(parent, s.run_name, default, describe)
        self.row.run_name = self.folder.name
        self._handlers.append(run_folder.open_log(self.folder))

    def start(
        self,
        source: Source,
        tokenizer: Tokenizer,
        train: TokenStream,
        val: TokenStream,
        scored_tokens: int,
        data: dict[str, str],
    ) -> None:
        """Called when settings and data are known to be good; ``data`` are its hashes."""
        if not self.speaks:
            return
        s = self.settings
        if s.logger.name == "wandb":
            from qat.runs.wandb_log import check_login

            check_login(s.logger)
        self._claim()
        if s.resume is not None:
            made_by = run_folder.note_resumption(self.path(""), machine.world_size())
            self.row.commit, self.row.hardware = made_by
        self.row.data = data
        self.row.val_xz_bits_per_byte = source.notes.get("val_xz_bits_per_byte")
        log.info(
            "run %s (qat=%s, grid %s, seed %d)", self.folder, self.row.qat, self.row.grid, s.seed
        )
        log.info(
            "%s: %s training tokens, %s validation tokens%s%s",
            source.identity["name"],
            f"{len(train):,}",
            f"{len(val):,}",
            f" ({scored_tokens:,} are scored; all: eval.max_tokens=null)"
            if isinstance(most := s.eval.max_tokens, int) and most < len(val) - 1
            else "",
            f"; xz needs {self.row.val_xz_bits_per_byte:.3f} bits per byte of the validation text"
            if self.row.val_xz_bits_per_byte
            else "",
        )
        if warning := tokenizer.warning:
            log.warning("warning: %s", warning)
        if s.model.init_from is not None and s.resume is None:
            self._compare_with_source(Path(s.model.init_from))
        compiled = "compiled" if s.compile == "true" else "eager"
        if s.compile == "false" and machine.has_cuda() and (missing := machine.no_compiler()):
            compiled = f"eager (nothing compiles here: {missing})"
        log.info(
            "%s, %s; the plan (bits with scales):\n%s", s.precision, compiled, plan_table(self.plan)
        )

    def _compare_with_source(self, source: Path) -> None:
        """Warn where the run that weights come from had other text: it may have seen what is
        validation text here, and its bits per byte are of another."""
        folder = source if source.is_dir() else source.parent
        try:
            before = Result.read(folder)
        except UserError:  # of a file beside the weights that is none of ours
            return
        if before is None and (folder / run_folder.CONFIG).is_file():
            log.warning("warning: model.init_from=%s: that run did not finish", source)
        if before is None or not before.data or not self.row.data:
            return
        sides = {"train": "training", "val": "validation"}
        if other := [s for side, s in sides.items() if before.data[side] != self.row.data[side]]:
            log.warning(
                "warning: model.init_from=%s was trained with other %s text than this run; "
                "data.files and the other settings of data say which",
                source, " and other ".join(other),
            )  # fmt: skip

    @property
    def checkpoint(self) -> Path:
        """On every rank the same file of a resumed run; written by rank 0 only."""
        return Path(self.settings.resume or self.path("")) / run_folder.CHECKPOINT

    def forked_state(self, code_bytes: int) -> dict[str, Any] | None:
        """What a run that has no checkpoint of its own goes on from; None if it is no fork.
        UserError if it cannot. ``code_bytes``: of the code now."""
        s = self.settings
        if s.fork.run is None:
            return None
        self._trunk = trunk_folder(s, self.job.sweep_dir)
        return forked_state(s, self._trunk, code_bytes)

    def kept_checkpoint(self, step: int) -> Path:
        path = run_folder.kept_checkpoint(self.path(""), step)
        path.parent.mkdir(exist_ok=True)
        return path

    def path(self, name: str) -> Path:
        """A file of this run. Ranks that write nothing get a path that they never touch."""
        return (self.folder or Path(tempfile.gettempdir())) / name

    def loggers(self, first_step: int) -> list[Logger]:
        """metrics.csv from after ``first_step``, and W&B beside it if asked for."""
        if self.folder is None:
            return []
        s = self.settings.logger
        csv = self._rows_of_steps(run_folder.METRICS, first_step, COLUMNS, self._trunk)
        if s.name == "csv":
            return [csv]
        from qat.runs.wandb_log import wandb_logger

        self._wandb = wandb_logger(self.folder, self.settings, self.row, self.job.sweep_dir)
        return [csv, self._wandb]

    def _rows_of_steps(
        self, name: str, first_step: int, columns: Sequence[str], trunk: Path | None
    ) -> MetricsFile:
        """``trunk``: folder of the run whose rows before the fork are this one's too."""
        assert self.folder is not None
        before = None if trunk is None else trunk / name
        return MetricsFile(self.folder / name, first_step, columns, before)

    def validation_curve(
        self, first_step: int, score: Callable[[Mapping[str, torch.Tensor]], float]
    ) -> ValidationCurve:
        """Written to curve.csv, from after ``first_step``."""
        points = self.settings.eval.curve_points
        if not points or self.folder is None:
            return ValidationCurve(points, score, lambda row, step: None)
        trunk = self._trunk if self._trunk and scores_alike(self.settings, self._trunk) else None
        file = self._rows_of_steps(run_folder.CURVE, first_step, val_curve.COLUMNS, trunk)
        return ValidationCurve(points, score, file.log_metrics)

    def finish(
        self,
        outcome: Outcome,
        proof: LivenessProof,
        train_tokens: int,
        exported: Export,
        scores: dict[str, Score],
        is_snapped: bool,
    ) -> int:
        """Fill in the row, write it, print it; returns the exit code.

        ``scores``: of the float, snapped and artifact weights; with averaging, of the
        last_float and last_snapped ones too. ``is_snapped``: the file gave back the very bits of
        the snapped weights, so one score is both.
        """
        row, s = self.row, self.settings
        row.status, row.exit_code = "finished", 0
        row.steps, row.tokens = outcome.steps, outcome.tokens
        row.epochs = outcome.tokens / train_tokens
        row.tokens_per_parameter_byte = outcome.tokens / self.plan.packed_bytes
        row.train_seconds = outcome.train_seconds
        row.ms_per_step = 1000 * outcome.train_seconds / outcome.steps
        if s.budget_seconds is not None:
            row.overshoot_seconds = max(0.0, outcome.train_seconds - s.budget_seconds)
        row.peak_memory_bytes = outcome.peak_memory_bytes
        row.train_loss = outcome.train_loss
        for name, score in scores.items():
            setattr(row, f"val_bpb_{name}", score.val_bpb)
        row.artifact_is_snapped = is_snapped
        row.val_tokens = scores["artifact"].num_tokens
        row.val_tokens_there = scores["artifact"].of_tokens
        row.val_loss_float = scores["float"].val_loss
        row.val_loss_artifact = scores["artifact"].val_loss
        row.quant_gap_bpb = scores["artifact"].val_bpb - scores["float"].val_bpb
        row.artifact_bytes = exported.artifact_bytes
        row.code_bytes = exported.budget.code_bytes
        row.qat_first_step, row.qat_steps = outcome.qat_first_step, outcome.qat_steps
        row.qat_never_started = s.qat.enabled and outcome.qat_steps == 0
        row.qat_last_step = outcome.qat_last_step
        assert proof.gradients is not None
        row.on_grid_share = proof.on_grid_share
        row.nonzero_gradient_share = proof.gradients.nonzero_share
        row.movable_share = proof.gradients.movable_share
        log.info(
            "liveness: %.4f of planned weights on their grid, %.4f of their gradients not zero, "
            "%.4f of rows movable, %d QAT steps (%s to %s)",
            proof.on_grid_share,
            proof.gradients.nonzero_share,
            proof.gradients.movable_share,
            outcome.qat_steps,
            outcome.qat_first_step,
            outcome.qat_last_step,
        )
        if proof.gradients.dead:
            log.warning("NO GRADIENT REACHES %s", ", ".join(proof.gradients.dead))
        if row.qat_never_started:
            log.warning(
                "QAT WAS ASKED FOR AND NEVER STARTED: the run ended after step %d", row.steps
            )
        if exported.is_oversize:
            row.status, row.exit_code = "oversize", OVERSIZE_EXIT_CODE
            row.error = (
                f"limit_bytes = {s.limit_bytes}: the artifact has {row.artifact_bytes} bytes and "
                f"the code {row.code_bytes}; kept as {exported.path.name}"
            )
            log.error("error: %s", row.error)
        self._write()
        if self.speaks and self.job.sweep_dir is None:
            print_table([row_of(row)])
        return row.exit_code

    def fail(self, error: str, exit_code: int) -> int:
        """Record a failure. A single run refused before it started leaves nothing behind."""
        self.row.status, self.row.exit_code, self.row.error = "failed", exit_code, error
        if self.speaks and self.folder is None and self.job.sweep_dir is not None:
            try:
                self._claim()
            except UserError as no_folder:
                log.error("this job has no row: %s", no_folder)
        try:
            self._write()
        except UserError as no_row:  # the reason was said already, and decides the exit code
            log.error("this run has no row: %s", no_row)
        return exit_code

    def _write(self) -> None:
        if self.folder is None:
            return
        self.row.write(self.folder)
        self._close_wandb(self.row.exit_code)

    def _close_wandb(self, exit_code: int) -> None:
        """W&B gives the next run of this process the one that is still open."""
        if self._wandb is not None:
            open_run, self._wandb = self._wandb, None
            open_run.finish(self.row, exit_code)

    def close(self) -> None:
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        self._close_wandb(128 + signal.SIGTERM)  # else it was closed with its row
        if self._lock is not None:
            self._lock.release()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
