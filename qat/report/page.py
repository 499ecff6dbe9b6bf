"""A study's report: one HTML file that needs nothing else, REPORT.md, and its pictures.

Both are made of the same sections, so they say the same. The page has no scripts and asks nothing
of a network; its theme is that of the reader's system.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qat.report import tables as tables
from qat.report.picture import DARK, LIGHT, Picture, as_svg, save_png
from qat.report.plots import pictures
from qat.report.tables import ReportTable
from qat.runs.run_folder import write_atomically
from qat.runs.tables import markdown_table
from qat.study.findings import Findings
from qat.study.significance import BAR_NATS

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Lines:
    caption: str
    lines: list[str]
    is_code: bool = False


@dataclass(frozen=True)
class Chapter:
    anchor: str
    title: str
    parts: list[Picture | ReportTable | Lines | str]  # str: a paragraph


def write_report(findings: Findings, folder: Path) -> list[str]:
    """REPORT.md, report.html, findings.json and the pictures into ``folder``, which exists; their
    names. UserError if a text cannot be written."""
    drawn = pictures(findings)
    texts = {
        "REPORT.md": markdown(findings, drawn),
        "report.html": page(findings, drawn),
        "findings.json": json.dumps(asdict(findings), indent=1) + "\n",
    }
    for name, written in texts.items():
        write_atomically(folder / name, written)
    return [*texts, *(save_png(picture, folder) for picture in drawn)]


def _facts(findings: Findings) -> dict[str, str]:
    seconds, steps = findings.budget_seconds, findings.priced_steps
    if seconds is not None:
        clock = f"{seconds:,g} s of training"
    elif steps is not None:
        clock = f"what {steps:,} updates of {findings.baseline} take, at the prices of each arm's"
    else:
        clock = "none; runs are bounded by steps"
    return {
        "Question": findings.question,
        "Baseline": findings.baseline,
        "Clock": clock,
        "Seeds": f"{len(findings.seeds)} ({', '.join(map(str, findings.seeds))})",
        "Hardware": "; ".join(findings.hardware),
        "Code": ", ".join(findings.commits),
    }


def _sections(findings: Findings, drawn: Sequence[Picture]) -> list[Chapter]:
    by_name = {picture.name: picture for picture in drawn}
    verdicts: list[Any] = [Lines("In words", findings.details)] if findings.details else []
    answer, *more = (
        tables.answer_table(findings),
        tables.verdict_table(findings),
        tables.equal_bytes_table(findings),
        tables.stores_table(findings),
    )
    verdicts += [table for table in (answer, *more) if table.rows]
    if missing := tables.missing_seeds(findings):
        verdicts.append(Lines("Started, and not compared", missing))
    if noted := tables.notes(findings):
        verdicts.append(Lines("To know of runs in the table", noted))
    verdicts.append(
        "Differences are treatment less reference: below 0 the treatment is better. p: paired t "
        "over seeds, two-sided; (Holm): adjusted for all comparisons of the table, as intervals "
        f"are not; over {BAR_NATS} nats: one-sided, that the treatment is better by more than "
        f"{BAR_NATS} nats per token. Detectable: the least difference that so many seeds find in 8 "
        "of 10 studies; seeds needed: how many would find the one measured. 1 mbpb is a thousandth "
        "of a bit per byte."
    )
    ledger: list[Any] = [by_name.get("waterfall", "No ledger was made: nothing to take apart.")]
    if findings.ledgers:
        ledger.append(tables.ledger_table(findings))
    return [
        Chapter("verdict", "Verdict", verdicts),
        Chapter("ledger", "What the difference is made of", ledger),
        Chapter("curves", "Training", [by_name.get("curves", "No training curve was recorded.")]),
        Chapter("pareto", "Bytes", [by_name.get("pareto", "No treatment has an artifact.")]),
        Chapter("seeds", "Seed by seed", [by_name.get("seeds", "No treatment was compared.")]),
        Chapter("runs", "Every run", [tables.runs_table(findings.rows)]),
        Chapter("audit", "Liveness and clock", _audit(findings)),
        Chapter("again", "Run it again", [Lines("In a shell", findings.commands, is_code=True)]),
        Chapter("reading", "How to read this", [_how_to_read(findings)]),
    ]


def _audit(findings: Findings) -> list[Any]:
    if not findings.rows:
        return ["No run was started."]
    table = tables.audit_table(findings.rows)
    wrong = len(table.bad_rows)
    summary = (
        f"{wrong} of {len(table.rows)} runs have a finding, in red and in words."
        if wrong
        else f"All {len(table.rows)} runs finished, trained as asked and kept the clock."
    )
    return [
        summary,
        table,
        "On grid: share of planned weights that the last QAT update saw bit for bit as the file "
        "stores them. With gradient: share of them with a gradient that is not 0. Movable: share "
        "of rows whose largest weight has one. A run may overshoot its clock by the rest of one "
        "step.",
    ]


def _how_to_read(findings: Findings) -> str:
    estimated = [ledger.name for ledger in findings.ledgers if not ledger.is_measured]
    throughput = (
        f" The throughput of {', '.join(estimated)} is estimated from the loss curve."
        if estimated
        else ""
    )
    return (
        "Paired: each difference is between two artifacts of one seed, so what a seed does to both "
        "cancels. Exact: bytes are those of files on disk and of the packed code; val_bpb is that "
        "of weights read back from the file; a ledger's parts add up to its total in every seed. "
        "Estimated: intervals, p and seeds needed, by Student's t over the seeds that gave both "
        f"artifacts, which takes differences to be normal.{throughput} One seed has a difference "
        "and no verdict."
    )


@cache
def template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE)


def page(findings: Findings, drawn: Sequence[Picture]) -> str:
    """The report as HTML."""
    return template().render(
        findings=findings, facts=_facts(findings), sections=_sections(findings, drawn),
        as_svg=as_svg, light=LIGHT, dark=DARK,
    )  # fmt: skip


def markdown(findings: Findings, drawn: Sequence[Picture]) -> str:
    """The report as Markdown; its pictures are files beside it."""
    facts = [f"- {name}: {_escaped(value)}" for name, value in _facts(findings).items()]
    parts = [f"# {_escaped(findings.name)}", f"**{_escaped(findings.headline)}**", "\n".join(facts)]
    for section in _sections(findings, drawn):
        parts += [f"## {section.title}", *map(_part_as_markdown, section.parts)]
    return "\n\n".join(parts) + "\n"


def _part_as_markdown(part: Picture | ReportTable | Lines | str) -> str:
    if isinstance(part, Picture):
        return f"![{_escaped(part.in_words)}]({part.name}.png)\n\n{part.how_to_read}"
    if isinstance(part, ReportTable):
        return _table_as_markdown(part)
    if isinstance(part, Lines):
        if part.is_code:
            return "\n".join(["```sh", *part.lines, "```"])
        return "\n".join([f"{part.caption}:", "", *(f"- {_escaped(line)}" for line in part.lines)])
    return _escaped(part)


def _table_as_markdown(table: ReportTable) -> str:
    titles = {_escaped(title): is_number for title, is_number in table.columns.items()}
    rows = [[_escaped(cell) for cell in row] for row in table.rows]
    for at in table.bad_rows:
        rows[at][1] = f"**{rows[at][1]}**"
    numbers = [title for title, is_number in titles.items() if is_number]
    return f"{table.caption}:\n\n{markdown_table(titles, rows, numbers)}"


def _escaped(text: str) -> str:
    """On one line, and no HTML."""
    return html.escape(" ".join(text.split()), quote=False)
