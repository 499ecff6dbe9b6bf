"""``eval.py task=choose``: which variant of a cabinet meets what you need.

Each constraint is the most that a variant may have of a quantity, or the least of a quality
(``AT_LEAST``). Among the variants that meet all of them and that no other beats (in the constrained
quantities, the cabinet's objective and bytes of the file), the best by the objective is named, and
which constraint would have to move, how far, for another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape
from rich.table import Table

from qat.cabinet.objective import BITS_PER_BYTE, Objective, Row
from qat.cabinet.summary import dominated, measured
from qat.errors import UserError
from qat.settings.terminal import print_wide

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

RESULTS, MANIFEST = "results.json", "manifest.json"
AT_LEAST = (
    "macro_f1", "accuracy", "mcc", "auc", "kappa", "items_per_second", "tokens_per_second",
    "latency_speedup", "throughput_speedup",
)  # fmt: skip
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


def objective_of(folder: Path) -> Objective:
    """What a cabinet's rows are judged by; ``val_bpb`` if its manifest does not say."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Objective(**found["objective"])
    except (OSError, ValueError, KeyError, TypeError):
        return BITS_PER_BYTE


def value(row: Row, constraint: str) -> float | None:
    """Of the constrained quantity; None where the system did not tell, or the task has none."""
    return row.get(KEYS.get(constraint, constraint))


def _breaks(name: str, found: float, limit: float) -> bool:
    return found < limit if name in AT_LEAST else found > limit


def failures(row: Row, constraints: Mapping[str, float]) -> list[str]:
    """Constraints that a row does not meet; what is not known meets none."""
    return [
        name
        for name, limit in constraints.items()
        if (found := value(row, name)) is None or _breaks(name, found, limit)
    ]


def choose(
    rows: Sequence[Row], constraints: Mapping[str, float], objective: Objective = BITS_PER_BYTE
) -> Chosen:
    """The unbeaten survivor that is best by the objective; of equals the one with fewer bytes."""
    survivors = [row for row in measured(rows) if not failures(row, constraints)]
    keys = sorted({KEYS.get(name, name) for name in constraints} | {objective.key, "disk_bytes"})
    higher = (*AT_LEAST, *((objective.key,) if objective.higher_is_better else ()))
    beaten = dominated(survivors, keys, higher)
    candidates = [row for row, out in zip(survivors, beaten, strict=True) if not out]
    best = min(candidates, key=lambda row: (objective.cost(row), row["disk_bytes"]), default=None)
    return Chosen(survivors, candidates, best)


def least_move(
    rows: Sequence[Row], constraints: Mapping[str, float], objective: Objective = BITS_PER_BYTE
) -> Move | None:
    """None where no single constraint, however far it moves, leads to another variant."""
    chosen = choose(rows, constraints, objective).chosen
    moves = []
    for name, limit in constraints.items():
        for to in {value(row, name) for row in measured(rows)}:
            if to is not None and _breaks(name, to, limit):
                winner = choose(rows, {**constraints, name: to}, objective).chosen
                if winner is not None and winner is not chosen:
                    moves.append(Move(name, to, winner))

    def share(move: Move) -> float:
        """How far, of a quality downwards."""
        times = move.to / constraints[move.constraint]
        return 1 - times if move.constraint in AT_LEAST else times - 1

    return min(moves, key=share, default=None)


def print_choice(
    rows: Sequence[Row], constraints: Mapping[str, float], objective: Objective = BITS_PER_BYTE
) -> None:
    """The table of who meets what, then the choice and the runner-up, on stdout."""
    found, move = choose(rows, constraints, objective), least_move(rows, constraints, objective)
    table = Table(title="What was asked for (!: not met)", title_justify="left")
    table.add_column("variant")
    signs = {name: ">=" if name in AT_LEAST else "<=" for name in constraints}
    for title in (
        objective.key,
        *(f"{name} {signs[name]} {_number(limit)}" for name, limit in constraints.items()),
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
            row["variant"], f"{row[objective.key]:.5f}", *cells,
            _verdict(row, found, constraints),
        )  # fmt: skip
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
            f"chosen: {found.chosen['variant']}, of {objective.best.replace('_', ' ', 1)} "
            f"({found.chosen[objective.key]:.5f}) among {len(found.candidates)} that meet all "
            f"constraints and are not beaten; {found.chosen['disk_bytes']:,} bytes"
        )
    print(_runner_up(move, constraints, objective))


def _cell(row: Row, name: str, limit: float) -> str:
    found = value(row, name)
    if found is None:
        return "not known !"
    return f"{_number(found)} !" if _breaks(name, found, limit) else _number(found)


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


def _runner_up(move: Move | None, constraints: Mapping[str, float], objective: Objective) -> str:
    if move is None:
        return "runner-up: none; no single constraint that moves leads to another variant"
    limit = constraints[move.constraint]
    share = move.to / limit - 1
    return (
        f"runner-up: {move.winner['variant']} ({objective.key} "
        f"{move.winner[objective.key]:.5f}) if "
        f"{move.constraint} may be {move.to!r} instead of {_number(limit)} ({share:+.1%})"
    )


def run(s: EvalTaskSettings, budget: Budget) -> int:
    """``eval.py task=choose cabinet=FOLDER constraints=...``."""
    assert s.cabinet is not None  # asked for by the checks of the settings
    typed = {name: limit for name, limit in vars(s.constraints).items() if limit is not None}
    folder = Path(s.cabinet)
    print_choice(read_rows(folder), typed, objective_of(folder))
    return 0
