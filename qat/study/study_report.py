"""``eval.py task=report study=NAME``: what the studies in a sweep's folder found, for reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from qat.errors import UserError
from qat.study.study_findings import find_out
from qat.study.study_page import write_report
from qat.study.study_runs import SUFFIX, Study


def report_study(file: Path) -> list[dict[str, Any]]:
    """Print the verdict, write the report into ``<study>/`` beside the file; the runs' rows."""
    study = Study.read(file)
    findings = find_out(file.parent, study, Console(stderr=True))
    folder = file.parent / study.name
    folder.mkdir(exist_ok=True)
    written = write_report(findings, folder)
    print(findings.headline)
    print(f"written: {folder}/{', '.join(written)}")
    return findings.rows


def report_studies(folder: Path) -> None:
    """UserError if there is no study in the folder."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"study={folder}: no study there; give the folder of a study's sweep")
    for file in files:
        report_study(file)
