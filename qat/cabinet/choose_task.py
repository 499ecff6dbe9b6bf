"""``eval.py task=choose``: which variant of a cabinet meets what you need.

Each constraint is the most that a variant may have of a quantity. Among the variants that meet all
of them and that no other beats (in the constrained quantities, val_bpb and bytes of the file), the
one of least val_bpb is named, and which constraint would have to move, how far, for another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape
from rich.table import Table

from qat.cabinet.summary import Row, dominated, measured
from qat.errors import UserError
from qat.settings.terminal import print_wide

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

RESULTS = "results.json"
KEYS = {"artifact_bytes": "disk_bytes"}  # a constraint's name -> the row's, where they differ


class Chosen(NamedTuple):
    """What the constraints lead to, of all that were measured."""

    survivors: list[Row]  # meet every constraint
    candidates: list[Row]  # those of them that no other beats
    chosen: Row | None


class Move(NamedTuple):
    """The least relaxation of one constraint, relative to its value, that changes the choice."""

    constraint: str
    to: float
    winner: Row


def read_rows(folder: Path) -> list[Row]:
    """The rows of a cabinet. UserError if the folder has none."""
    path = folder / RESULTS
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cabinet={folder}: {RESULTS}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"cabinet={folder}: {RESULTS} is not JSON ({error})") from None
    is_rows = isinstance(rows, list) and all(
        isinstance(row, dict) and {"variant", "status"} <= row.keys() for row in rows
    )
    if not is_rows:
        raise UserError(
            f"cabinet={folder}: {RESULTS} has no rows of a cabinet; give another folder"
        )
    return rows


def value(row: Row, constraint: str) -> float | None:
    """Of the constrained quantity; None where the system did not tell."""
    return row[KEYS.get(constraint, constraint)]


def failures(row: Row, constraints: Mapping[str, float]) -> list[str]:
    """Constraints that a row does not meet; what is not known meets none."""
    return [
        name
        for name, limit in constraints.items()
        if (found := value(row, name)) is None or found > limit
    ]


def choose(rows: Sequence[Row], constraints: Mapping[str, float]) -> Chosen:
    """The unbeaten survivor of least val_bpb; of equals the one with fewer bytes."""
    survivors = [row for row in measured(rows) if not failures(row, constraints)]
    keys = sorted({KEYS.get(name, name) for name in constraints} | {"val_bpb", "disk_bytes"})
    beaten = dominated(survivors, keys)
    candidates = [row for row, out in zip(survivors, beaten, strict=True) if not out]
    best = min(candidates, key=lambda row: (row["val_bpb"], row["disk_bytes"]), default=None)
    return Chosen(survivors, candidates, best)


def least_move(rows: Sequence[Row], constraints: Mapping[str, float]) -> Move | None:
    """None where no single constraint, however far it moves, leads to another variant."""
    chosen = choose(rows, constraints).chosen
    moves = []
    for name, limit in constraints.items():
        for to in {value(row, name) for row in measured(rows)}:
            if to is not None and to > limit:
                winner = choose(rows, {**constraints, name: to}).chosen
                if winner is not None and winner is not chosen:
                    moves.append(Move(name, to, winner))
    return min(moves, key=lambda move: move.to / constraints[move.constraint], default=None)


def print_choice(rows: Sequence[Row], constraints: Mapping[str, float]) -> None:
    """The table of who meets what, then the choice and the runner-up, on stdout."""
    found, move = choose(rows, constraints), least_move(rows, constraints)
    table = Table(title="At most what was asked for (!: more than that)", title_justify="left")
    table.add_column("variant")
    for title in (
        "val_bpb",
        *(f"{name} <= {_number(limit)}" for name, limit in constraints.items()),
    ):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for row in rows:
        if row["status"] != "measured":
            blank = [""] * (len(constraints) + 1)
            table.add_row(row["variant"], *blank, escape(f"{row['status']}: {row['reason']}"))
            continue
        cells = [_cell(row, name, limit) for name, limit in constraints.items()]
        table.add_row(
            row["variant"], f"{row['val_bpb']:.5f}", *cells, _verdict(row, found, constraints)
        )
    print_wide(table)
    for title, kept in (
        ("meet all", found.survivors),
        ("of these beaten", [row for row in found.survivors if row not in found.candidates]),
    ):
        print(f"{title}: {', '.join(row['variant'] for row in kept) or 'none'}")
    if found.chosen is None:
        print("chosen: none; no variant meets all constraints")
    else:
        print(
            f"chosen: {found.chosen['variant']}, of least val_bpb "
            f"({found.chosen['val_bpb']:.5f}) among {len(found.candidates)} that meet all "
            f"constraints and are not beaten; {found.chosen['disk_bytes']:,} bytes"
        )
    print(_runner_up(move, constraints))


def _cell(row: Row, name: str, limit: float) -> str:
    found = value(row, name)
    if found is None:
        return "not known !"
    return f"{_number(found)} !" if found > limit else _number(found)


def _number(value: float) -> str:
    return f"{value:,.9g}"


def _verdict(row: Row, found: Chosen, constraints: Mapping[str, float]) -> str:
    if row is found.chosen:
        return "chosen"
    if row in found.candidates:
        return "meets all"
    if row in found.survivors:
        return "meets all, beaten"
    return f"fails {', '.join(failures(row, constraints))}"


def _runner_up(move: Move | None, constraints: Mapping[str, float]) -> str:
    if move is None:
        return "runner-up: none; no single constraint that moves leads to another variant"
    limit = constraints[move.constraint]
    share = move.to / limit - 1
    return (
        f"runner-up: {move.winner['variant']} (val_bpb {move.winner['val_bpb']:.5f}) if "
        f"{move.constraint} may be {move.to!r} instead of {_number(limit)} (+{share:.1%})"
    )


def run(s: EvalTaskSettings, budget: Budget) -> int:
    """``eval.py task=choose cabinet=FOLDER constraints=...``."""
    assert s.cabinet is not None  # asked for by the checks of the settings
    typed = {name: limit for name, limit in vars(s.constraints).items() if limit is not None}
    print_choice(read_rows(Path(s.cabinet)), typed)
    return 0
