"""Which weight does what in a model, found by watching a forward pass.

Every product with a matrix goes through ``F.linear`` and every lookup through ``F.embedding``, also
inside ``nn.Linear`` and ``nn.Embedding``, so watching these two functions shows who reads what,
whatever the modules are called, and a tied head too, which no module computes. Attention by
``nn.MultiheadAttention`` is a function of its own, inside which the products are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.model.registry import empty_model
from qat.model.spec import ModelSpec

PROBE_TOKENS = 8


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a tensor, several in a tuple, or named ones in a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


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
        if func is F.multi_head_attention_forward:  # the mode is off inside
            linear = F.linear
            F.linear = partial(self._watched, linear)
            try:
                return func(*args, **kwargs)
            finally:
                F.linear = linear
        if func in (F.linear, F.embedding):
            return self._watched(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _watched(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if (name := self._names.get(id(weight))) is not None:
            self._see(name, args[0] if args else kwargs["input"], func is F.embedding)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Wiring:
    """Names of weights, each kind in the order in which a forward pass comes to them.

    ``lookups``: rows taken by index. ``matrices``: what multiplies, but for ``head``, the matrix
    that makes the logits of a language model (a lookup too if it is tied); None: a model of another
    kind, where the matrices that multiply count alike. ``blocks``: the matrices, parted by the
    layer (a child of an ``nn.ModuleList`` or ``nn.Sequential``) that they are in.
    """

    lookups: tuple[str, ...]
    matrices: tuple[str, ...]
    head: str | None
    blocks: tuple[tuple[str, ...], ...]

    @property
    def is_tied(self) -> bool:
        return self.head in self.lookups

    @property
    def ends(self) -> tuple[str, ...]:
        """Lookups and head, each once."""
        head = () if self.head is None else (self.head,)
        return (*(name for name in self.lookups if name != self.head), *head)


@torch.no_grad()
def wiring_in(model: nn.Module, inputs: Any = None) -> Wiring:
    """Of a model, by a pass over ``inputs``; without any it is a language model and reads a few
    tokens. ValueError if the head of one is no matrix seen."""
    weights = dict(model.named_parameters())
    products: list[str] = []
    lookups: list[str] = []

    def see(name: str, _x: Tensor, is_lookup: bool) -> None:
        (lookups if is_lookup else products).append(name)

    head = None
    if inputs is None:
        device = next(iter(weights.values())).device
        ids_BT = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
        with Watch(weights, see):
            logits_BTV = model(ids_BT)
        head = products[-1] if products else None
        if head is None or len(weights[head]) != logits_BTV.size(-1):
            raise ValueError(
                "the last matrix is not the head: logits come from nn.Linear or F.linear"
            )
    else:
        args, kwargs = arguments(inputs)
        with Watch(weights, see):
            model(*args, **kwargs)
    looked_up = set(lookups)
    matrices = [
        name
        for name in dict.fromkeys(products)
        if name != head and (head is not None or name not in looked_up)
    ]
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
