"""``artifact.fit``: measure what matters, let the solver fill the limit, show what it chose."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qat.artifact.budget import Fitted, Solver
from qat.artifact.bundle import count_code_bytes
from qat.artifact.candidates import Source, Stored
from qat.artifact.container import pack
from qat.errors import TrainingError
from qat.language.gpt import GPT, GPTShape
from qat.quantize.plan import Plan, Steps
from qat.study.budget_plot import choices_table, draw_curve
from qat.training.sensitivity import Batch, fisher_diagonal, mean_loss

if TYPE_CHECKING:
    from qat.settings.schema import ArtifactSettings

log = logging.getLogger("qat")
PLOT = "rd.png"  # in a run's folder


@dataclass(frozen=True)
class TrainedModel:
    """Weights and the plan (with learned or given steps) that they are stored by.

    ``is_on_grid``: the last training steps saw the snapped weights, not the masters.
    """

    shape: GPTShape
    weights: Mapping[str, Tensor]
    plan: Plan
    steps: Steps
    is_on_grid: bool


class BudgetSolver:
    """Sensitivities and candidates of one model, for any number of limits."""

    def __init__(
        self,
        model: TrainedModel,
        batches: Sequence[Batch],
        precision: str,
        prune: bool,
        console: Console,
    ) -> None:
        self.model, self.batches, self.precision, self.console = model, batches, precision, console
        with torch.device("meta"):
            self.gpt = GPT(model.shape)
        self.masters = {name: w.detach() for name, w in model.weights.items()}
        self.reference = self.masters
        if model.is_on_grid:
            self.reference = model.plan.snap(self.masters, model.steps)
        shown = self._track(batches, "sensitivities")
        sensitivity = fisher_diagonal(self.gpt, self.reference, shown, precision)
        sources = [
            Source(
                entry,
                self.masters[entry.name].cpu(),
                self.reference[entry.name].cpu(),
                sensitivity[entry.name].cpu(),
                model.steps.get(entry.name),
            )
            for entry in model.plan.on_grid
        ]
        costs = [source.costs(prune) for source in self._track(sources, "candidates")]
        self.solver = Solver(sources, costs)

    def _track(self, items: Sequence[Any], title: str):
        quiet = not self.console.is_terminal
        return track(items, title, console=self.console, transient=True, disable=quiet)

    def fit(
        self, limit_bytes: int, meta: Mapping[str, Any], coder: str
    ) -> tuple[TrainedModel, Fitted]:
        """The model on the plan that fills the limit, code bytes taken off."""

        def size_of(stored: Sequence[Stored]) -> int:
            fit = self._whole(stored)
            return len(pack(fit.plan.encode(fit.weights, fit.steps), fit.plan, meta, coder))

        fitted = self.solver.fit(limit_bytes - count_code_bytes(), size_of)
        return self._whole(fitted.stored), fitted

    def _whole(self, stored: Sequence[Stored]) -> TrainedModel:
        """The chosen tensors among those that are kept as floats, in the plan's order."""
        chosen = {item.entry.name: item for item in stored}
        entries = [
            chosen[entry.name].entry if entry.name in chosen else entry for entry in self.model.plan
        ]
        weights = {
            name: chosen[name].weights if name in chosen else w.cpu()
            for name, w in self.masters.items()
        }
        given = {n: item.steps for n, item in chosen.items() if item.steps is not None}
        return replace(self.model, plan=Plan(entries), weights=weights, steps=given)

    def measured_loss(self, fit: TrainedModel) -> float:
        """Increase of the loss on the calibration text, beside the predicted one."""
        device = next(iter(self.masters.values())).device
        stored = {n: w.to(device) for n, w in fit.plan.snap(fit.weights, fit.steps).items()}
        before, after = (
            mean_loss(self.gpt, weights, self.batches, self.precision)
            for weights in (self.reference, stored)
        )
        return after - before


def stored_label(plan: Plan, artifact: ArtifactSettings) -> str:
    """How a run's file is stored, as tables say it."""
    label = plan.label + ("+fit" if artifact.fit else "")
    if artifact.method == "gptq":
        label += f"+gptq{artifact.gptq_bit_price:g}" if artifact.gptq_bit_price else "+gptq"
    return label


def fit_artifact(
    model: TrainedModel,
    batches: Sequence[Batch],
    precision: str,
    artifact: ArtifactSettings,
    limit_bytes: int,
    meta: Mapping[str, Any],
    plot: Path,
    console: Console,
) -> TrainedModel:
    """The model on the plan that fills the limit; says with what, and draws the curve in ``plot``.

    TrainingError if a weight is not finite.
    """
    started = time.monotonic()
    try:
        solver = BudgetSolver(model, batches, precision, artifact.prune, console)
        fit, fitted = solver.fit(limit_bytes, meta, artifact.coder)
    except ValueError as error:
        raise TrainingError(
            f"artifact.fit: {error}; if training diverged, lower the learning rates"
        ) from None
    measured = solver.measured_loss(fit)
    budget_bytes = limit_bytes - count_code_bytes()
    log.info("chosen by the budget solver:\n%s", choices_table(fitted))
    log.info(
        "budget solver: %s bytes, %.3f %% of the %s that limit_bytes leaves; loss predicted "
        "%+.5f, measured %+.5f nats per token on %s training tokens; %.0f s off the clock",
        f"{fitted.num_bytes:,}", 100 * fitted.num_bytes / budget_bytes, f"{budget_bytes:,}",
        fitted.predicted_loss, measured, f"{sum(ids.numel() for ids, _ in batches):,}",
        time.monotonic() - started,
    )  # fmt: skip
    if fitted.note:
        log.warning("budget solver: %s", fitted.note)
    draw_curve(fitted, measured, budget_bytes, plot)
    return fit
