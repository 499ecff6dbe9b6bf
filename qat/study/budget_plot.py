"""What the budget solver chose, as a table, and what it chose from, as a curve."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from qat.artifact.budget import Fitted
from qat.study.plan_table import as_text


def choices_table(fitted: Fitted) -> str:
    """What each tensor is stored as, and what that is predicted to cost."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("tensor", "choice", "grid"):
        table.add_column(title)
    for title in ("step / std", "bits/weight", "predicted loss"):
        table.add_column(title, justify="right")
    for cost, stored, loss in zip(fitted.costs, fitted.stored, fitted.losses, strict=True):
        choice, entry, grid = cost.choice, stored.entry, stored.entry.grid
        table.add_row(
            entry.name,
            choice.name,
            grid.label if grid else entry.dtype,
            f"{choice.size * fitted.zoom:.3f}" if choice.rule else "",
            f"{cost.bits / entry.num_elements:.2f}",
            f"{loss:+.6f}",
        )
    return as_text(table)


def draw_curve(fitted: Fitted, measured: float, budget_bytes: int, path: Path) -> None:
    """Predicted loss over bytes, the limit, and the plan that was chosen."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(size / 1e6, loss) for size, loss in fitted.curve if loss > 0]
    axes.plot(*zip(*points, strict=True), "o-", markersize=3, label="least predicted")
    axes.axvline(budget_bytes / 1e6, color="grey", linestyle="--", label="limit less code")
    at = fitted.num_bytes / 1e6
    axes.plot(at, fitted.predicted_loss, "s", color="black", label="chosen, predicted")
    if measured > 0:
        axes.plot(at, measured, "x", color="red", label="chosen, measured")
    axes.set_yscale("log")
    axes.set_xlabel("artifact, MB")
    axes.set_ylabel("rise of the loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
