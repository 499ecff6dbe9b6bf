"""Which weight does what in a model, found by watching a forward pass.

Every product with a matrix goes through ``F.linear`` and every lookup through ``F.embedding``, also
inside ``nn.Linear`` and ``nn.Embedding``, so watching these two functions shows who reads what,
whatever the modules are called, and a tied head too, which no module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.model.registry import empty_model
from qat.model.spec import ModelSpec

PROBE_TOKENS = 8


class Watch(TorchFunctionMode):
    """While entered, calls ``see(name, input, is_lookup)`` before each named weight is used."""

    def __init__(
        self, weights: Mapping[str, Tensor], see: Callable[[str, Tensor, bool], None]
    ) -> None:
        super().__init__()
        self._weights = weights  # kept: ids of tensors that are gone are given to others
        self._names = {id(w): name for name, w in weights.items()}
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.embedding):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if (name := self._names.get(id(weight))) is not None:
                self._see(name, args[0] if args else kwargs["input"], func is F.embedding)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Wiring:
    """Names of weights, each kind in the order in which a forward pass comes to them.

    ``lookups``: rows taken by index. ``matrices``: what multiplies, but for ``head``, the matrix
    that makes the logits (a lookup too if it is tied). ``blocks``: the matrices, parted by the
    layer (a child of an ``nn.ModuleList`` or ``nn.Sequential``) that they are in.
    """

    lookups: tuple[str, ...]
    matrices: tuple[str, ...]
    head: str
    blocks: tuple[tuple[str, ...], ...]

    @property
    def is_tied(self) -> bool:
        return self.head in self.lookups

    @property
    def ends(self) -> tuple[str, ...]:
        """Lookups and head, each once."""
        return (*(name for name in self.lookups if name != self.head), self.head)


@torch.no_grad()
def wiring_in(model: nn.Module) -> Wiring:
    """Of a model, by a pass over a few tokens. ValueError if its head is no matrix seen."""
    weights = dict(model.named_parameters())
    products: list[str] = []
    lookups: list[str] = []

    def see(name: str, _x: Tensor, is_lookup: bool) -> None:
        (lookups if is_lookup else products).append(name)

    device = next(iter(weights.values())).device
    ids_BT = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    with Watch(weights, see):
        logits_BTV = model(ids_BT)
    head = products[-1] if products else None
    if head is None or len(weights[head]) != logits_BTV.size(-1):
        raise ValueError("the last matrix is not the head: logits come from nn.Linear or F.linear")
    matrices = [name for name in dict.fromkeys(products) if name != head]
    layers = [
        f"{name}.{child}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child, _ in module.named_children()
    ]
    blocks: dict[str, list[str]] = {}
    for name in matrices:
        inside = [layer for layer in layers if name.startswith(layer)]
        blocks.setdefault(min(inside, key=len, default=name), []).append(name)
    return Wiring(
        tuple(dict.fromkeys(lookups)), tuple(matrices), head, tuple(map(tuple, blocks.values()))
    )


@cache
def wiring_of(spec: ModelSpec) -> Wiring:
    """Of any model of this spec; nothing is allocated."""
    return wiring_in(empty_model(spec))
