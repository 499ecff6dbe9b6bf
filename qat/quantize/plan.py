"""Which parameter lives on which grid, and which is kept as a plain float.

A plan is built once from names and shapes and covers *every* tensor. "Snapped" weights are the
whole plan applied: planned tensors on their grid, the others cast to their storage dtype and back,
because that is what the file stores. A tied weight has one name and so one entry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qat.quantize.grid import Grid
from qat.quantize.rounding import (
    DTYPES,
    SCALE_DTYPES,
    Codes,
    check_finite,
    decode,
    encode,
    snap,
)

Scales = Mapping[str, Tensor]  # learned scales (rows, groups) by tensor name

NONE_LEARNED: Scales = {}
NO_RULES: Mapping[str, Grid] = {}
MAX_DIMENSIONS = 8


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
    def num_rows(self) -> int:
        """A vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def scales_shape(self) -> tuple[int, int]:
        """(rows, groups) of a tensor on a grid."""
        assert self.grid is not None
        return self.grid.scales_shape(self.shape)

    @property
    def num_zeros(self) -> int:
        """Zero points of a tensor on an asymmetric grid, a byte each."""
        asymmetric = self.grid is not None and self.grid.range == "asymmetric"
        return math.prod(self.scales_shape) if asymmetric else 0

    @property
    def stored_floats(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """What a file stores of it as floats, in order: scales, minima, the tensor's scale; or all
        of its values."""
        if self.grid is None:
            return [(DTYPES[self.dtype], self.shape)]
        scales = SCALE_DTYPES[self.grid.scale_dtype], self.scales_shape
        minima = [scales] if self.grid.table.has_minimum else []
        return [scales, *minima, *([(torch.float32, (1,))] if self.grid.has_tensor_scale else [])]

    @property
    def packed_bytes(self) -> int:
        """Size before entropy coding, codes packed at their bit width; scales included."""
        floats = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.stored_floats)
        if self.grid is None:
            return floats
        return math.ceil(self.num_elements * self.grid.table.bits / 8) + floats + self.num_zeros

    def snap(self, w: Tensor, scales: Tensor | None = None) -> Tensor:
        """``w`` as a file would give it back."""
        if self.grid is None:
            return w.to(DTYPES[self.dtype]).float()
        return snap(w, self.grid, scales)


@dataclass(frozen=True)
class Encoded:
    """What a file stores of one tensor: codes and scales, or the plain values in storage dtype."""

    entry: Entry
    coded: Codes | None = None
    plain: Tensor | None = None

    @property
    def floats(self) -> list[Tensor]:
        """As ``entry.stored_floats`` lists them."""
        if self.coded is None:
            assert self.plain is not None
            return [self.plain]
        minima = None if self.entry.num_zeros else self.coded.zeros
        found = (self.coded.scales, minima, self.coded.tensor_scale)
        return [tensor for tensor in found if tensor is not None]

    def decode(self) -> Tensor:
        """Float32 weights."""
        if self.coded is None:
            return self.floats[0].float()
        assert self.entry.grid is not None
        return decode(self.coded, self.entry.grid)


class Plan:
    """An ordered set of entries, one per tensor."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    @staticmethod
    def for_model(
        module: nn.Module,
        grid: Grid,
        keep: Collection[str] = (),
        rules: Mapping[str, Grid] = NO_RULES,
        dtype: str = "fp32",
    ) -> Plan:
        """Matrices of Linear and Embedding layers on ``grid``, all else as floats of ``dtype``.

        ``rules`` (glob -> grid, the first that matches counts) reach other layers' matrices too;
        what a glob of ``keep`` matches stays float whatever the rules say. Norms, vectors, biases
        and what has no elements always do. A glob matches a parameter's name or that of a module it
        is in; a tied parameter, planned once, has every name it goes by. ValueError: a glob that
        matches nothing (of ``rules``: no matrix), an unknown dtype, or nothing on any grid.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype}: choose from {', '.join(DTYPES)}")
        layers: dict[nn.Parameter, list[nn.Module]] = {}
        modules = dict(module.named_modules(remove_duplicate=False))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            layers.setdefault(parameter, []).append(modules[name.rpartition(".")[0]])
        matrices = {
            parameter
            for parameter, found in layers.items()
            if parameter.dim() > 1
            and parameter.numel()
            and not any("norm" in type(m).__name__.lower() for m in found)
        }
        kept = kept_parameters(module, keep)
        chosen = {
            parameter: grid
            for parameter in matrices
            if any(isinstance(layer, nn.Linear | nn.Embedding) for layer in layers[parameter])
        }
        for glob in reversed(list(rules)):  # the first rule has the last word
            of_rule = _matching(module, glob) & matrices
            if not of_rule:
                raise ValueError(f"rules: {glob!r} matches no matrix of the model")
            chosen |= dict.fromkeys(of_rule, rules[glob])
        entries = [
            Entry(name, tuple(parameter.shape), chosen[parameter])
            if parameter in chosen and parameter not in kept
            else Entry(name, tuple(parameter.shape), None, dtype)
            for name, parameter in module.named_parameters()
        ]
        plan = Plan(entries)
        if not plan.on_grid:
            raise ValueError("nothing of the model lives on a grid; give rules for its matrices")
        return plan

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.entries == other.entries

    @property
    def on_grid(self) -> list[Entry]:
        return [entry for entry in self if entry.grid is not None]

    @property
    def packed_bytes(self) -> int:
        """Size of the whole plan before entropy coding: known before training."""
        return sum(entry.packed_bytes for entry in self)

    @property
    def digest(self) -> str:
        """Hex hash of everything the plan says."""
        return hashlib.sha256(json.dumps(self.as_json()).encode()).hexdigest()

    @torch.no_grad()
    def snap(
        self, weights: Mapping[str, Tensor], scales: Scales = NONE_LEARNED
    ) -> dict[str, Tensor]:
        """Masters -> the weights a file written from them gives back."""
        return {e.name: e.snap(weights[e.name].detach(), scales.get(e.name)) for e in self}

    @torch.no_grad()
    def encode(self, weights: Mapping[str, Tensor], scales: Scales = NONE_LEARNED) -> list[Encoded]:
        """Masters -> what a file stores. ValueError names a tensor that is not finite."""
        encoded = []
        for entry in self:
            w = weights[entry.name].detach()
            if entry.grid is None:
                plain = w.to(DTYPES[entry.dtype])
                check_finite(entry.name, w, plain.reshape(1, -1))
                encoded.append(Encoded(entry, plain=plain.cpu()))
            else:
                coded = encode(w, entry.grid, scales.get(entry.name)).cpu()
                encoded.append(Encoded(entry, coded))
                for floats in encoded[-1].floats:
                    check_finite(entry.name, w, floats)
        return encoded

    @property
    def label(self) -> str:
        """The grids' labels, the one with most elements first."""
        elements: dict[str, int] = {}
        for entry in self.on_grid:
            assert entry.grid is not None
            elements[entry.grid.label] = elements.get(entry.grid.label, 0) + entry.num_elements
        return "+".join(sorted(elements, key=lambda label: (-elements[label], label)))

    def as_json(self) -> list[dict]:
        """Plain data from which ``from_json`` rebuilds an equal plan."""
        return [
            {"name": e.name, "shape": list(e.shape)}
            | ({"dtype": e.dtype} if e.grid is None else {"grid": e.grid.as_json()})
            for e in self
        ]

    @staticmethod
    def from_json(rows: list[dict]) -> Plan:
        """Rebuild a plan; ValueError, TypeError or KeyError if the data is not a plan's."""
        entries = []
        for row in rows:
            name, shape = row["name"], tuple(row["shape"])
            # Names reach terminals, and shapes torch, which has no tensor of so many dimensions.
            is_named = isinstance(name, str) and name.isprintable()
            is_shape = isinstance(row["shape"], list) and len(shape) <= MAX_DIMENSIONS
            if not is_named or not is_shape or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"plan entry {str(name)[:80]!r} has no usable name or shape")
            if "grid" in row:
                entries.append(Entry(name, shape, Grid.from_json(row["grid"])))
            elif row["dtype"] in DTYPES:
                entries.append(Entry(name, shape, None, row["dtype"]))
            else:
                raise ValueError(f"plan entry {name[:80]!r} has an unknown dtype")
        if len({entry.name for entry in entries}) != len(entries):
            raise ValueError("the plan names a tensor twice")
        return Plan(entries)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, wherever the tensors are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def kept_parameters(module: nn.Module, keep: Collection[str]) -> set[nn.Parameter]:
    """Those that a glob of ``keep`` matches, by name or by that of a module they are in. ValueError
    names a glob that matches none."""
    kept = set()
    for glob in keep:
        if not (found := _matching(module, glob)):
            raise ValueError(f"keep: {glob!r} matches no parameter or module of the model")
        kept |= found
    return kept


def _matching(module: nn.Module, glob: str) -> set[nn.Parameter]:
    found = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        inside = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        if any(fnmatchcase(path, glob) for path in inside):
            found.add(parameter)
    return found


def build_plan(
    shapes: Mapping[str, tuple[int, ...]],
    grids: Mapping[str, Grid],
    rules: Mapping[str, str],
    grid_min_elements: int = 0,
) -> Plan:
    """Give each tensor the storage of the first glob in ``rules`` that matches its name.

    A rule is the name of a grid in ``grids``, or fp16, bf16 or fp32. Of what a rule puts on a grid
    vectors and tensors without elements stay fp32, and those of fewer than ``grid_min_elements``
    elements fp16, as in the challenge's export. ValueError: a tensor without a rule, an unknown
    rule, nothing on any grid.
    """
    if taken := sorted(set(grids) & set(DTYPES)):
        raise ValueError(f"plan.grids.{taken[0]}: the name of a dtype; give another")
    for glob, asked in rules.items():
        if asked not in grids and asked not in DTYPES:
            options = ", ".join([*grids, *DTYPES])
            raise ValueError(f"plan.rules: {asked!r} for {glob}: choose from {options}")
    entries = []
    for name, shape in shapes.items():
        rule = next((rule for glob, rule in rules.items() if fnmatchcase(name, glob)), None)
        if rule is None:
            raise ValueError(f"plan.rules: no pattern matches {name}; end the rules with '*'")
        if rule in grids and (len(shape) < 2 or 0 in shape):
            entries.append(Entry(name, tuple(shape)))
        elif rule in DTYPES:
            entries.append(Entry(name, tuple(shape), None, rule))
        elif math.prod(shape) < grid_min_elements:
            entries.append(Entry(name, tuple(shape), None, "fp16"))
        else:
            entries.append(Entry(name, tuple(shape), grids[rule]))
    plan = Plan(entries)
    if not plan.on_grid:
        raise ValueError("plan.rules: nothing lives on a grid; give a matrix the rule 'grid'")
    return plan
