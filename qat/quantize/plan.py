"""Which parameter lives on which grid, and which is kept as a plain float.

A plan is built once from names and shapes and covers *every* tensor. "Snapped" weights are the
whole plan applied: planned tensors on their grid, the others cast to their storage dtype and back,
because that is what the file stores. A tied weight has one name and so one entry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from qat.quantize.grid import DTYPES, Grid, check_finite, decode, encode

GRID = "grid"
STORAGE = (GRID, "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Entry:
    """One tensor of the plan: either on a grid, or kept in a float storage dtype."""

    name: str
    shape: tuple[int, ...]
    grid: Grid | None = None
    dtype: str = "fp32"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def steps_shape(self) -> tuple[int, int]:
        """(rows, groups) of a tensor on a grid."""
        assert self.grid is not None
        rows, columns = (1, self.num_elements) if len(self.shape) < 2 else self._rows_columns()
        return rows, self.grid.num_groups(columns)

    def _rows_columns(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    def snap(self, w: Tensor) -> Tensor:
        if self.grid is None:
            return w.to(DTYPES[self.dtype]).float()
        return decode(*encode(w, self.grid), self.grid)


@dataclass(frozen=True)
class Encoded:
    """What a file stores of one tensor: codes and steps, or the plain values in storage dtype."""

    entry: Entry
    codes: Tensor | None = None
    steps: Tensor | None = None
    plain: Tensor | None = None

    @property
    def floats(self) -> Tensor:
        """The part stored as floats: steps, or the plain values."""
        values = self.plain if self.steps is None else self.steps
        assert values is not None
        return values

    def decode(self) -> Tensor:
        """Float32 weights."""
        if self.entry.grid is None:
            assert self.plain is not None
            return self.plain.float()
        assert self.codes is not None
        assert self.steps is not None
        return decode(self.codes, self.steps, self.entry.grid)


class Plan:
    """An ordered set of entries, one per tensor."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.entries == other.entries

    @property
    def on_grid(self) -> list[Entry]:
        return [entry for entry in self if entry.grid is not None]

    @property
    def digest(self) -> str:
        """Hex hash of everything the plan says."""
        return hashlib.sha256(json.dumps(self.as_json()).encode()).hexdigest()

    @torch.no_grad()
    def snap(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masters -> the weights a file written from them gives back."""
        return {entry.name: entry.snap(weights[entry.name].detach()) for entry in self}

    @torch.no_grad()
    def encode(self, weights: Mapping[str, Tensor]) -> list[Encoded]:
        """Masters -> what a file stores. ValueError names a tensor that is not finite."""
        encoded = []
        for entry in self:
            w = weights[entry.name].detach()
            if entry.grid is None:
                plain = w.to(DTYPES[entry.dtype])
                check_finite(entry.name, w, plain.reshape(1, -1))
                encoded.append(Encoded(entry, plain=plain.cpu()))
            else:
                codes, steps = encode(w, entry.grid)
                check_finite(entry.name, w, steps)
                encoded.append(Encoded(entry, codes=codes.cpu(), steps=steps.cpu()))
        return encoded

    def rows(self) -> list[tuple[str, str, str, int]]:
        """(name, shape, storage, elements) per tensor, for printing."""
        return [
            (
                e.name,
                "x".join(map(str, e.shape)),
                e.grid.label if e.grid else e.dtype,
                e.num_elements,
            )
            for e in self
        ]

    def as_json(self) -> list[dict]:
        """Plain data from which ``from_json`` rebuilds an equal plan."""
        return [
            {"name": e.name, "shape": list(e.shape)}
            | ({"dtype": e.dtype} if e.grid is None else {"grid": asdict(e.grid)})
            for e in self
        ]

    @staticmethod
    def from_json(rows: list[dict]) -> Plan:
        """Rebuild a plan; ValueError, TypeError or KeyError if the data is not a plan's."""
        entries = []
        for row in rows:
            name, shape = row["name"], tuple(row["shape"])
            if not isinstance(name, str) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"plan entry {str(name)[:80]!r} has no usable name or shape")
            if "grid" in row:
                entries.append(Entry(name, shape, Grid(**row["grid"])))
            elif row["dtype"] in DTYPES:
                entries.append(Entry(name, shape, None, row["dtype"]))
            else:
                raise ValueError(f"plan entry {name[:80]!r} has an unknown dtype")
        if len({entry.name for entry in entries}) != len(entries):
            raise ValueError("the plan names a tensor twice")
        return Plan(entries)


def build_plan(
    shapes: Mapping[str, tuple[int, ...]],
    grid: Grid,
    rules: Mapping[str, str],
    grid_min_elements: int = 0,
) -> Plan:
    """Give each tensor the storage of the first glob in ``rules`` that matches its name.

    A rule is ``grid``, ``fp16``, ``bf16`` or ``fp32``; tensors that a rule puts on the grid but
    that have fewer than ``grid_min_elements`` elements are kept as fp16, as in the challenge's
    export. ValueError: a tensor without a rule, an unknown rule, or a plan with nothing on the
    grid."""
    entries = []
    for name, shape in shapes.items():
        rule = next((rule for glob, rule in rules.items() if fnmatchcase(name, glob)), None)
        if rule is None:
            raise ValueError(f"plan.rules: no pattern matches {name}; end the rules with '*'")
        if rule not in STORAGE:
            raise ValueError(f"plan.rules: {rule!r} for {name}: choose from {', '.join(STORAGE)}")
        small = rule == GRID and math.prod(shape) < grid_min_elements
        if rule == GRID and not small:
            entries.append(Entry(name, tuple(shape), grid))
        else:
            entries.append(Entry(name, tuple(shape), None, "fp16" if small else rule))
    plan = Plan(entries)
    if not plan.on_grid:
        raise ValueError("plan.rules: nothing lives on the grid; give a matrix the rule 'grid'")
    return plan
