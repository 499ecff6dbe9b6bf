"""Names beside the dots of a scatter plot, each where it covers no other name and no dot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FONT_SIZE = 7  # points
CHARACTER_WIDTH, LINE_HEIGHT = 0.62 * FONT_SIZE, 1.25 * FONT_SIZE
RADIUS = 4  # points, of a dot
GAP = 5  # points, from a dot's centre to its name
DISTANCES = (1, 2.5, 4, 6, 8)  # in gaps; the nearest free place is taken
DIRECTIONS = ((1, 1), (1, 0), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))

Box = tuple[float, float, float, float]  # left, bottom, right, top


def label_points(
    axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str | None]
) -> None:
    """Write each name beside its point, with a line to it if it had to go far; None: no name.

    Limits, scales and legend of the axes have to be final. Where all places are taken a name is
    left out rather than written over another.
    """
    axes.figure.draw_without_rendering()  # fixes the layout; a canvas of no backend does not
    to_points = 72 / axes.figure.dpi
    area = axes.get_window_extent()
    left, bottom, right, top = (to_points * edge for edge in area.extents)
    places = [tuple(to_points * xy) for xy in axes.transData.transform(points)]
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    taken.append(tuple(to_points * edge for edge in axes.get_legend().get_window_extent().extents))
    for (x, y), point, name in zip(places, points, names, strict=True):
        if name is None:
            continue
        width = CHARACTER_WIDTH * len(name)
        for distance, (dx, dy) in ((d, way) for d in DISTANCES for way in DIRECTIONS):
            start = x + dx * GAP * distance - width * (1 - dx) / 2
            base = y + dy * GAP * distance * 1.5 - LINE_HEIGHT / 2
            box = (start, base, start + width, base + LINE_HEIGHT)
            is_inside = left < box[0] and bottom < box[1] and box[2] < right and box[3] < top
            if is_inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 2}
                axes.annotate(
                    name, point, xytext=(start - x, base - y + LINE_HEIGHT / 2),
                    textcoords="offset points", va="center", fontsize=FONT_SIZE,
                    arrowprops=line if distance > 1 else None,
                )  # fmt: skip
                break


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
