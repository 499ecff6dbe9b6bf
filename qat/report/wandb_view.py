"""The saved comparison of a study in W&B: a workspace of its runs, grouped by arm.

Its description is a JSON file in the study's folder, made without network. Once the runs are
synced, one command saves it: ``python -m qat.report.wandb_view FILE [ENTITY]``. The file then holds
the id it was saved under, so saving again updates it. The library (a public preview) reads and
writes such JSON in private methods only; the tests say if they change.
"""

from __future__ import annotations

import sys
from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

from qat.errors import UserError
from qat.runs.run_folder import write_atomically
from qat.runs.wandb_log import TRAIN_JOB, refusals_named
from qat.study.findings import Findings

FILE = "wandb_view.json"
# Columns beside the run's name, as W&B writes them; the lowest artifact bpb stands first.
KEY_COLUMNS = [
    "run:displayName",
    "config:arm",
    "config:seed",
    *(f"summary:{key}" for key in ("val_bpb_artifact", "artifact_bytes", "quant_gap_bpb", "steps")),
]


def comparison_view(findings: Findings, group: str, entity: str, project: str) -> ws.Workspace:
    """A workspace of the training runs in ``group``; not saved, asks no network."""
    arm, bpb = panels.Config("arm"), "val_bpb_artifact"
    words = "\n\n".join([findings.question, f"**{findings.headline}**", *findings.details])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{findings.name}: arms compared",
        sections=[
            ws.Section(
                name="Verdict",
                is_open=True,
                panels=[panels.MarkdownPanel(words)],
            ),
            ws.Section(
                name="Arms",
                is_open=True,
                panels=[
                    panels.LinePlot(
                        title="training loss over the clock, mean and range over seeds",
                        x="elapsed_seconds",
                        y=["train_loss"],
                        groupby=arm,
                        groupby_aggfunc="mean",
                        groupby_rangefunc="minmax",
                    ),
                    panels.ScatterPlot(
                        title="bytes against bpb of the artifact",
                        x=panels.SummaryMetric("artifact_bytes"),
                        y=panels.SummaryMetric(bpb),
                    ),
                    panels.BarPlot(
                        title="bpb of the artifact, mean over seeds",
                        metrics=[bpb],
                        groupby=arm,
                        groupby_aggfunc="mean",
                    ),
                ],
            ),
            ws.Section(name="Runs", is_open=True, panels=[panels.RunComparer(diff_only="split")]),
        ],
        runset_settings=ws.RunsetSettings(
            # As text: the library's own quoting breaks on names with quotes.
            filters=f"Metric('Group') == {group!r} and Metric('JobType') == {TRAIN_JOB!r}",
            groupby=[ws.Config("arm")],
            order=[ws.Ordering(ws.Summary(bpb))],
            pinned_columns=KEY_COLUMNS,
        ),
    )


def _read(file: Path) -> ws.Workspace:
    try:
        text = file.read_text(encoding="utf-8")
        return ws.Workspace._from_model(ws.internal.View.model_validate_json(text))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: no view of a study ({reason}); delete it and make the report again"
        ) from None


def _write(view: ws.Workspace, file: Path) -> None:
    text = view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)
    write_atomically(file, text + "\n")


def describe_view(view: ws.Workspace, file: Path) -> None:
    """Writes the view's JSON. A view that the file describes already is replaced and keeps its
    id."""
    if file.exists():
        saved = _read(file)
        view._internal_name, view._internal_id = saved._internal_name, saved._internal_id
    _write(view, file)


def save_view(file: Path, entity: str | None = None) -> str:
    """Saves the view online, under the login's own entity unless told another; returns its URL.

    UserError if W&B refuses, or the file is no view.
    """
    view = _read(file)
    with refusals_named():
        entity = entity or wandb.Api().default_entity
        if entity is None:
            raise UserError(f"{file}: this login has no default entity; name one after the file")
        view.entity = entity
        view.save()
        _write(view, file)
        return view.url


def main(arguments: list[str]) -> int:
    """``FILE [ENTITY]``; returns the exit code."""
    if len(arguments) not in (1, 2):
        print(f"usage: python -m qat.report.wandb_view FOLDER/{FILE} [ENTITY]", file=sys.stderr)
        return UserError.exit_code
    try:
        print(save_view(Path(arguments[0]), *arguments[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
