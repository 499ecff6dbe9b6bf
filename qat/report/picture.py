"""One picture of a study's report: for a PNG file as it is, for the page as SVG.

Colours go by role, a light and a dark value for each: pictures are drawn in the light ones, and in
the page's copy each becomes the CSS variable of its role, so one picture serves both themes. Text
has a contrast of 4.5 or more and marks of 3 or more against ``surface`` and ``raised`` (WCAG 2 AA);
``grid`` is decoration. In the SVG text stays text, and the same numbers give the same bytes.
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

LIGHT = {
    "surface": "#ffffff", "raised": "#f3f5f8", "ink": "#1b2230", "muted": "#566073",
    "rule": "#808080", "grid": "#d9dde3", "bad": "#b3261e",
    "blue": "#2b6cb0", "orange": "#b8500c", "green": "#1a7f5a", "purple": "#7b4fa3",
    "teal": "#0f7c8a", "gold": "#8a6a00", "rose": "#b83a6b",
}  # fmt: skip
DARK = {
    "surface": "#14171c", "raised": "#1e232b", "ink": "#e7eaf0", "muted": "#a9b2c1",
    "rule": "#8f97a4", "grid": "#363d48", "bad": "#ff8f85",
    "blue": "#7fb3ee", "orange": "#f0955a", "green": "#5cc49a", "purple": "#bf9be6",
    "teal": "#56c0cf", "gold": "#d3ae3f", "rose": "#ee86ad",
}  # fmt: skip
ARMS = ("ink", "blue", "orange", "green", "purple", "gold", "teal", "rose")  # the baseline first


def as_variables(text: str) -> str:
    """``text`` with each light colour replaced by the CSS variable of its role."""
    for role, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{role})")
    return text


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
