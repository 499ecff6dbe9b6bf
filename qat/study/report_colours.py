"""The colours of the study report's page and pictures, by role: a light and a dark value for each.

Pictures are drawn in the light ones. In the page's copy each becomes the CSS variable of its role,
so one picture serves both themes. Text has a contrast of 4.5 or more and marks of 3 or more against
``surface`` and ``raised`` (WCAG 2 AA); ``grid`` is decoration.
"""

from __future__ import annotations

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
