"""``eval.py task=report``: what the studies in a sweep's folder found, any runs, or a cabinet."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qat.errors import UserError
from qat.runs.run_folder import CONFIG, run_folders, write_atomically
from qat.runs.tables import as_markdown, print_table
from qat.study.find_out import find_out, find_out_runs
from qat.study.findings import Findings
from qat.study.significance import as_line
from qat.study.study import Study, studies_in, study_file
from qat.text.source import matching

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.command_line import Sweep
    from qat.settings.schema import EvalTaskSettings, LoggerSettings

# Imported by name: what only a study needs is no part of train_gpt.py.
PAGE, COMPARISON = "qat.report.page", "qat.report.wandb_comparison"
CABINET_PAGE = "qat.report.cabinet_page"


def find_run_folders(pattern: str) -> list[Path]:
    """Run folders matched by a glob; a sweep's folder stands for the runs in it."""
    found: list[Path] = []
    for path in matching(pattern):
        if (path / CONFIG).is_file():
            found.append(path)
        elif path.is_dir():
            found += run_folders(path)
    if not found:
        raise UserError(f"runs={pattern}: no run folder found")
    return found


def verdict_lines(findings: Findings) -> list[str]:
    """One for each treatment that has a baseline with two seeds or more; failed seeds are named."""
    lines = []
    for treatment in findings.treatments:
        alike = treatment.alike
        if alike is None or alike.verdict.num_seeds < 2:
            continue
        seeds = f"seeds {', '.join(map(str, sorted(alike.by_seed)))}"
        if failed := sorted(treatment.missing_seeds.keys() - treatment.val_bpb.keys()):
            seeds += f"; failed: {', '.join(map(str, failed))}"
        lines.append(f"{treatment.name} ({seeds}): {as_line(alike.verdict)}")
    return lines


def report(folders: list[Path], into: Path) -> list[dict[str, Any]]:
    """Print the table, write it ``into`` a folder as Markdown and JSON, return the rows."""
    findings = find_out_runs(folders, Console(stderr=True))
    rows, lines = findings.rows, verdict_lines(findings)
    print_table(rows)
    for line in lines:
        print(line)
    into.mkdir(parents=True, exist_ok=True)
    text = "".join(f"\n{line}\n" for line in lines)
    write_atomically(into / "report.md", as_markdown(rows) + text)
    write_atomically(into / "report.json", json.dumps(rows, indent=1) + "\n")
    print(f"also written: {into / 'report.md'} and report.json")
    return rows


def report_study(sweep: Path, study: Study, logger: LoggerSettings) -> list[dict[str, Any]]:
    """Print the verdict, write the report into ``<sweep>/<study>/``; the runs' rows.

    With logger=wandb the comparison is logged too, in the group of the study's runs.
    """
    findings = find_out(sweep, study, Console(stderr=True))
    folder = sweep / study.name
    folder.mkdir(exist_ok=True)
    written = import_module(PAGE).write_report(findings, folder)
    print_table(findings.rows)
    print("\n".join([findings.headline, *findings.details]))
    print(f"written: {folder}/{', '.join(written)}")
    if logger.name == "wandb":
        logger = replace(logger, group=logger.group or sweep.name)
        print(import_module(COMPARISON).log_comparison(findings, folder, logger))
    return findings.rows


def report_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """``report_study`` of what was just run; the rows of all its runs."""
    assert sweep.study is not None
    study = Study.read(study_file(sweep.folder, sweep.study))
    return report_study(sweep.folder, study, sweep.jobs[0][0].logger)


def run(s: EvalTaskSettings, budget: Budget) -> int:
    """Of studies into their folder; of other runs beside them if they share one, else into
    runs_dir. UserError if there are none."""
    if s.cabinet:
        print(f"written: {import_module(CABINET_PAGE).write_page(Path(s.cabinet))}")
        return 0
    if s.study:
        for study in studies_in(Path(s.study)):
            report_study(Path(s.study), study, s.logger)
        return 0
    assert s.runs
    folders = find_run_folders(s.runs)
    parents = {folder.parent for folder in folders}
    report(folders, parents.pop() if len(parents) == 1 else Path(s.runs_dir))
    return 0
