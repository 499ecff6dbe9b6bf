"""Filling the limit: measure what matters, let the solver fill it, show what it chose."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from qat.artifact.container import pack
from qat.budget.budget import Budget
from qat.budget.candidates import Stored, TrainedTensor
from qat.budget.solver import Solution, Solver
from qat.errors import TrainingError
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.ptq.calibration import Batch
from qat.ptq.sensitivity import fisher_diagonal, mean_loss
from qat.quantize.plan import Plan, Scales, digest_of
from qat.settings.terminal import as_text

if TYPE_CHECKING:
    from qat.settings.schema import ArtifactSettings

log = logging.getLogger("qat")

PLOT = "rd.png"  # in a run's folder
TIMED_ITEMS, SAID_SECONDS = 8, 10.0  # what takes longer is said after so many


@dataclass(frozen=True)
class TrainedModel:
    """Weights and the plan (with learned or given scales) that they are stored by.

    ``is_on_grid``: the last training steps saw the snapped weights, not the masters.
    """

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    plan: Plan
    scales: Scales
    is_on_grid: bool


class BudgetSolver:
    """Sensitivities and candidates of one model, for any number of limits."""

    def __init__(
        self,
        model: TrainedModel,
        batches: Sequence[Batch],
        precision: str,
        console: Console,
    ) -> None:
        self.model, self.batches, self.precision, self.console = model, batches, precision, console
        self.empty = empty_model(model.spec)
        self.masters = {name: w.detach().clone() for name, w in model.weights.items()}
        self.reference = self.masters
        if model.is_on_grid:
            self.reference = model.plan.snap(self.masters, model.scales)
        shown = self._track(batches, "sensitivities")
        sensitivity = fisher_diagonal(self.empty, self.reference, shown, precision)
        scales = {name: found.detach().cpu() for name, found in model.scales.items()}
        sources = [
            TrainedTensor(
                entry,
                self.masters[entry.name].cpu(),
                self.reference[entry.name].cpu(),
                sensitivity[entry.name].cpu(),
                scales.get(entry.name),
            )
            for entry in model.plan.on_grid
        ]
        costs = [source.costs() for source in self._track(sources, "candidates")]
        self.solver = Solver(sources, costs)

    def _track(self, items: Sequence[Any], title: str):
        quiet, started = not self.console.is_terminal, time.monotonic()
        shown = track(items, title, console=self.console, transient=True, disable=quiet)
        for number, item in enumerate(shown):
            if number == TIMED_ITEMS:
                seconds = (time.monotonic() - started) / number * len(items)
                if seconds > SAID_SECONDS:
                    log.info("budget solver: %s, about %.0f s off the clock", title, seconds)
            yield item

    def solve(
        self, budget: Budget, meta: Mapping[str, Any], coder: str
    ) -> tuple[TrainedModel, Solution]:
        """The model on the plan that fills the budget."""

        def size_of(stored: Sequence[Stored]) -> int:
            whole = self._whole(stored)
            return len(
                pack(whole.plan.encode(whole.weights, whole.scales), whole.plan, meta, coder)
            )

        solution = self.solver.solve(budget, size_of)
        return self._whole(solution.stored), solution

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
        given = {n: item.scales for n, item in chosen.items() if item.scales is not None}
        return replace(self.model, plan=Plan(entries), weights=weights, scales=given)

    def measured_loss(self, filled: TrainedModel) -> float:
        """Increase of the loss on the calibration text, beside the predicted one."""
        device = next(iter(self.masters.values())).device
        snapped = filled.plan.snap(filled.weights, filled.scales)
        return self._loss({n: w.to(device) for n, w in snapped.items()}) - self._reference_loss

    @cached_property
    def _reference_loss(self) -> float:
        return self._loss(self.reference)

    def _loss(self, weights: Mapping[str, Tensor]) -> float:
        return mean_loss(self.empty, weights, self.batches, self.precision)


_kept: dict[str, BudgetSolver] = {}  # the last one, by what it was made of


def solver_for(
    model: TrainedModel, batches: Sequence[Batch], precision: str, console: Console
) -> BudgetSolver:
    """The last one again if it was made of the very same: a study fills one limit after the other
    with its baseline."""
    text = {f"{n}.{k}": t for n, batch in enumerate(batches) for k, t in enumerate(batch)}
    said = [asdict(model.spec), model.plan.as_json(), model.is_on_grid, precision]
    key = json.dumps([*said, *map(digest_of, (model.weights, model.scales, text))])
    if key not in _kept:
        _kept.clear()  # before the next one needs the memory
        _kept[key] = BudgetSolver(model, batches, precision, console)
    return _kept[key]


def stored_label(plan: Plan, artifact: ArtifactSettings) -> str:
    """How a run's file is stored, as tables say it."""
    label = plan.label + ("+fill" if artifact.fill else "")
    if artifact.method == "gptq":
        label += f"+gptq{artifact.gptq_bit_price:g}" if artifact.gptq_bit_price else "+gptq"
    return label


def fill_budget(
    model: TrainedModel,
    batches: Sequence[Batch],
    precision: str,
    coder: str,
    budget: Budget,
    meta: Mapping[str, Any],
    plot: Path,
    console: Console,
) -> TrainedModel:
    """The model on the plan that fills the budget; says with what, and draws the curve in ``plot``.

    TrainingError if a weight is not finite.
    """
    started = time.monotonic()
    try:
        solver = solver_for(model, batches, precision, console)
        filled, solution = solver.solve(budget, meta, coder)
    except ValueError as error:
        raise TrainingError(
            f"artifact.fill: {error}; if training diverged, lower the learning rates"
        ) from None
    measured = solver.measured_loss(filled)
    budget_bytes = budget.artifact_bytes
    log.info("chosen by the budget solver:\n%s", choices_table(solution))
    log.info(
        "budget solver: %s bytes, %.3f %% of the %s that limit_bytes leaves; loss predicted "
        "%+.5f, measured %+.5f nats per token on %s training tokens; %.0f s off the clock",
        f"{solution.num_bytes:,}", 100 * solution.num_bytes / budget_bytes, f"{budget_bytes:,}",
        solution.predicted_loss, measured, f"{sum(ids.numel() for ids, _ in batches):,}",
        time.monotonic() - started,
    )  # fmt: skip
    if solution.note:
        log.warning("budget solver: %s", solution.note)
    draw_curve(solution, measured, budget_bytes, plot)
    return filled


def choices_table(solution: Solution) -> str:
    """What each tensor is stored as, and what that is predicted to cost."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("tensor", "choice", "grid"):
        table.add_column(title)
    for title in ("scale / std", "bits/weight", "predicted loss"):
        table.add_column(title, justify="right")
    for cost, stored, loss in zip(solution.costs, solution.stored, solution.losses, strict=True):
        choice, entry, grid = cost.choice, stored.entry, stored.entry.grid
        table.add_row(
            entry.name,
            choice.name,
            grid.label if grid else entry.dtype,
            f"{choice.size * solution.zoom:.3f}" if choice.rule else "",
            f"{cost.bits / entry.num_elements:.2f}" if entry.num_elements else "",
            f"{loss:+.6f}",
        )
    return as_text(table)


def draw_curve(solution: Solution, measured: float, budget_bytes: int, path: Path) -> None:
    """Predicted loss over bytes, the limit, and the plan that was chosen."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(size / 1e6, loss) for size, loss in solution.curve if loss > 0]
    axes.plot(*zip(*points, strict=True), "o-", markersize=3, label="least predicted")
    axes.axvline(budget_bytes / 1e6, color="grey", linestyle="--", label="limit less code")
    at = solution.num_bytes / 1e6
    axes.plot(at, solution.predicted_loss, "s", color="black", label="chosen, predicted")
    if measured > 0:
        axes.plot(at, measured, "x", color="red", label="chosen, measured")
    axes.set_yscale("log")
    axes.set_xlabel("artifact, MB")
    axes.set_ylabel("rise of the loss, nats per token")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:  # the file is worth more than its picture
        log.warning("warning: cannot write %s: %s", path, error.strerror or error)
