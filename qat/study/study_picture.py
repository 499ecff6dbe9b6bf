"""One picture of a study's report: for a PNG file as it is, for the page as SVG.

Drawn in the light colours of ``report_colours.py``; in the SVG they become CSS variables, text
stays text, and the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import textwrap
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qat.study.report_colours import LIGHT, as_variables

INK, MUTED, RULE, SURFACE = (LIGHT[role] for role in ("ink", "muted", "rule", "surface"))
BETTER, WORSE = LIGHT["blue"], LIGHT["orange"]  # told apart by red-blind readers too
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "study", "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE, "axes.titlecolor": INK,
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": LIGHT["grid"], "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "font.size": 9, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": False,
}  # fmt: skip
NAME_CHARS = 34


@dataclass(frozen=True)
class Picture:
    name: str  # of its file, and of its part of the page
    how_to_read: str
    in_words: str  # for those who do not see it
    figure: Any


def in_style() -> AbstractContextManager[None]:
    """To draw in, and to save in: axes make their ticks when they are saved."""
    from matplotlib import rc_context  # slow to import

    return rc_context(STYLE)


def save_png(picture: Picture, folder: Path) -> str:
    """Write the picture into the folder; its file's name."""
    name = f"{picture.name}.png"
    with in_style():
        picture.figure.savefig(folder / name, dpi=150)
    return name


def as_svg(picture: Picture) -> Markup:
    """An ``<svg>`` to stand in an HTML page: its ids begin with the picture's name, its colours are
    CSS variables."""
    written = io.StringIO()
    with in_style():
        picture.figure.savefig(written, format="svg", transparent=True)
    _, _, inside = written.getvalue().partition("</metadata>")
    inside = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", inside)
    width, height = (72 * inches for inches in picture.figure.get_size_inches())
    opening = Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}" '
        'style="min-width: {:.0f}px; max-width: {:.0f}px">'
    ).format(picture.in_words, width, height, 1.15 * width, 1.45 * width)
    return opening + Markup(as_variables(inside.replace("xlink:href", "href")))


def wrapped(name: str) -> str:
    return textwrap.fill(name, NAME_CHARS)
