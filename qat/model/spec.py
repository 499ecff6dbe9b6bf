"""What rebuilds a model: its sizes and the name of its architecture. Stored in every file.

An architecture is a file of this folder with the line ``ARCHITECTURE = ItsClass``: nothing else can
be named, so a name in somebody's file imports nothing else. Settings are checked with this before
torch is imported, so it is not imported here.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BASELINE = "gpt"  # the architecture of a file that names none
MARK = "\nARCHITECTURE = "


@cache
def architectures() -> tuple[str, ...]:
    """Names of the architectures, found by looking at the files."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(path.stem for path in files if MARK in path.read_text("utf-8")))


@dataclass(unsafe_hash=True)
class ModelSpec:
    """Everything that fixes the tensors of a model, and the settings ``model.*``; what each size
    does, the architecture says.

    As good as frozen: OmegaConf takes ``frozen=True`` for settings that nobody may set.
    """

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    mlp_mult: int
    tie_embeddings: bool = True
    name: str = BASELINE  # a file in qat/model
    # Sizes and constants that only this architecture has; it takes them with ``own``
    more: dict[str, float] = field(default_factory=dict, hash=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def own(self, **defaults: float) -> dict[str, Any]:
        """``more`` over the architecture's ``defaults``, whole numbers where these are.

        ValueError for a name that is not among them, or a value that is not above 0.
        """
        if unknown := sorted(set(self.more) - set(defaults)):
            has = ", ".join(defaults) or "none"
            raise ValueError(f"more.{unknown[0]}: {self.name} has no such size; it has {has}")
        found = {}
        for name, default in defaults.items():
            value, kind = self.more.get(name, default), type(default)
            if not 0 < value < math.inf or kind(value) != value:
                whole = "whole number" if kind is int else "number"
                raise ValueError(f"more.{name} = {value}: give a {whole} above 0")
            found[name] = kind(value)
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data from which ``from_json`` rebuilds an equal spec; the baseline is not named."""
        rows = asdict(self)
        if self.name == BASELINE:
            del rows["name"]
        if not self.more:
            del rows["more"]
        return rows

    @staticmethod
    def from_json(rows: Any) -> ModelSpec:
        """Of data that anybody may have written; ValueError or TypeError if it is no spec's."""
        spec = ModelSpec(**rows)
        if spec.name not in architectures():
            raise ValueError(f"architecture {spec.name!r:.80}")
        sizes = asdict(spec)
        more, is_tied = sizes.pop("more"), sizes.pop("tie_embeddings")
        del sizes["name"]
        if type(is_tied) is not bool or any(type(n) is not int or n < 1 for n in sizes.values()):
            raise ValueError("its model has a size that is none")
        if not isinstance(more, dict) or any(type(x) not in (int, float) for x in more.values()):
            raise ValueError("its model has a size that is none")
        return spec
