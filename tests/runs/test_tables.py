"""Tables of runs stay tables, whatever an error says."""

from __future__ import annotations

import re

from qat.runs.tables import COLUMNS, as_markdown


def test_a_bar_in_a_cell_ends_no_cell() -> None:
    note = "a|b is missing\nsee c"
    _, _, line, _ = as_markdown([{"run_name": "r", "note": note}]).split("\n")
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    assert len(cells) == len(COLUMNS)
    assert cells[-1].strip() == "a\\|b is missing see c"
