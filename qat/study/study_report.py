"""``eval.py task=report``: what the studies in a sweep's folder found, or any runs, for reading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qat.study.report import find_run_folders, print_table, report
from qat.study.study_findings import find_out
from qat.study.study_page import write_report
from qat.study.study_runs import Study, studies_in, study_file

if TYPE_CHECKING:
    from qat.settings.command_line import Sweep
    from qat.settings.schema import EvalTaskSettings, LoggerSettings


def report_study(sweep: Path, study: Study, logger: LoggerSettings) -> list[dict[str, Any]]:
    """Print the verdict, write the report into ``<sweep>/<study>/``; the runs' rows.

    With logger=wandb the comparison is logged too, in the group of the study's runs.
    """
    findings = find_out(sweep, study, Console(stderr=True))
    folder = sweep / study.name
    folder.mkdir(exist_ok=True)
    written = write_report(findings, folder)
    print_table(findings.rows)
    print(findings.headline)
    print(f"written: {folder}/{', '.join(written)}")
    if logger.name == "wandb":
        from qat.study.wandb_comparison import log_comparison

        print(log_comparison(findings, folder, replace(logger, group=logger.group or sweep.name)))
    return findings.rows


def report_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """``report_study`` of what was just run; the rows of all its runs."""
    assert sweep.study is not None
    settings, _ = sweep.jobs[0]
    return report_study(
        sweep.folder, Study.read(study_file(sweep.folder, sweep.study)), settings.logger
    )


def report_studies(sweep: Path, logger: LoggerSettings) -> None:
    """UserError if there is no study in the folder."""
    for study in studies_in(sweep):
        report_study(sweep, study, logger)


def run(s: EvalTaskSettings) -> int:
    """Of studies into their folder; of other runs beside them if they share one, else into
    runs_dir."""
    if s.study:
        report_studies(Path(s.study), s.logger)
        return 0
    assert s.runs
    folders = find_run_folders(s.runs)
    parents = {folder.parent for folder in folders}
    report(folders, parents.pop() if len(parents) == 1 else Path(s.runs_dir))
    return 0
