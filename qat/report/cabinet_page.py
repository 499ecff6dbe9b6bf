"""A cabinet's REPORT.md as one HTML file that needs nothing else, in the frame of a study's page.

It says what REPORT.md says and no more: sections, tables, lists and pictures are taken from it.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from qat.errors import UserError
from qat.report.page import Chapter, Lines, template
from qat.report.picture import DARK, LIGHT
from qat.report.tables import ReportTable
from qat.runs.run_folder import write_atomically

REPORT, PAGE = "REPORT.md", "report.html"


@dataclass(frozen=True)
class PngPicture:
    """A picture of the folder; ``figure``: its file."""

    name: str
    figure: Path
    how_to_read: str = ""


@dataclass(frozen=True)
class Heading:
    """What the frame says above all."""

    name: str
    headline: str


def write_page(folder: Path) -> Path:
    """report.html beside REPORT.md. UserError without one."""
    try:
        text = (folder / REPORT).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cabinet={folder}: {REPORT}: {error.strerror}") from None
    head, *sections = re.split(r"^## ", text, flags=re.M)
    title, _, summary = head.removeprefix("# ").partition("\n")
    chapters = []
    for section in sections:
        name, _, body = section.partition("\n")
        blocks = [block for block in body.strip().split("\n\n") if block.strip()]
        parts = [part for block in blocks for part in _parts(block, name, folder)]
        chapters.append(Chapter(re.sub(r"\W+", "-", name.lower()), name, parts))
    page = template().render(
        findings=Heading(f"The cabinet in {folder}", title), facts={"Rows": summary.strip()},
        sections=chapters, as_svg=_inside, light=LIGHT, dark=DARK,
    )  # fmt: skip
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _parts(block: str, title: str, folder: Path) -> list:
    lines = block.splitlines()
    if block.startswith("| "):
        return [_table(lines, title)]
    if block.startswith("```"):
        return [Lines("As it was", lines[1:-1], is_code=True)]
    if all(line.startswith("- ") for line in lines):
        return [Lines(title, [line.removeprefix("- ") for line in lines])]
    if found := re.findall(r"!\[(.*?)\]\((.*?)\)", block):
        return [PngPicture(name, folder / file) for name, file in found]
    return [block.replace("**", "")]


def _table(lines: list[str], title: str) -> ReportTable:
    """Numbers to the right: columns that hold nothing else."""
    header, _, *rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]
    is_number = [
        all(re.fullmatch(r"[-+.,\d%*]*", row[at]) for row in rows) for at in range(len(header))
    ]
    return ReportTable(title, dict(zip(header, is_number, strict=True)), rows)


def _inside(picture: PngPicture) -> Markup:
    data = base64.b64encode(picture.figure.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}" style="max-width: 100%">').format(
        picture.name, data
    )
