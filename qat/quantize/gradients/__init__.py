"""Gradient rules: what the model sees of a master weight, and how gradients get back to it.

A rule is a file of this folder that says ``RULE``, a subclass of ``GradientRule``. Files are found
by looking, and a file's name is the value of ``qat.gradient``: docs/add_a_gradient.md. None of it
runs inside the model's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple

import torch
from torch import Tensor

from qat.compiled import compiled
from qat.quantize.fused import has_one_statistic
from qat.quantize.grid import Grid
from qat.quantize.rounding import by_group, scales_of


class Seen(NamedTuple):
    """The weight seen; d seen / d master (None: 1) and, per weight, d seen / d scale (or None).

    The switch rotates around a rule where a grid rotates: to a rule ``w`` is the rotated master, on
    a grid that does not rotate, and so are the weight and slopes that it gives.
    """

    weight: Tensor
    slope: Tensor | None = None
    scale_slope: Tensor | None = None


class GradientRule:
    """One rule at work in one run: an object of its own, so it may keep state."""

    is_on_grid = True  # the weights seen are those of the grid, while QAT is on
    snaps_only = False  # seen is ``snap(w, grid)`` and nothing else, which a fused pass does sooner
    draws = False  # asks for a generator
    anneals = False  # reads ``progress``, which stays 0 for those that do not say so
    pulls = False  # does something in ``before_update``
    strength: float | None = None  # of what pulls, in that which the file says; None: nothing does
    takes_rotated = True  # also works where ``see`` is given a rotated copy of the master
    compiles = False  # set by the switch where training is compiled: see ``by_group``

    def supports(self, grid: Grid) -> bool:
        """The relaxations need levels 1 apart, and one scale for coding and decoding."""
        plain = grid.code_scale_dtype is None and not grid.refit
        return grid.table.is_even and grid.range != "asymmetric" and plain

    def see(
        self,
        w: Tensor,
        grid: Grid,
        *,
        name: str = "",
        scales: Tensor | None = None,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Seen:
        """Once per update and tensor, without autograd. ``w`` is float32 (the master: what is
        written into it stays), ``name`` the parameter's;
        ``scales`` are learned ones (rows, groups); ``progress`` runs from 0 at the switch to 1;
        ``generator`` is the same on every rank, another for every tensor and update.
        """
        raise NotImplementedError

    def by_group(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        w: Tensor,
        grid: Grid,
        *others: Tensor,
        scales: Tensor | None = None,
        number: float = 0.0,
    ) -> list[Tensor]:
        """What ``function(view, scale, *others' views, grid=, number=)`` makes of every group of
        ``w`` and of tensors of its shape, in one pass where training is compiled (on a CPU).

        So the function is one of a module, does the same to every element, and holds nothing else
        that changes: ``number`` is a tensor of no dimensions. Scales are those that a file stores.
        """
        is_compiled = self.compiles and not w.is_cuda
        if scales is not None or not (is_compiled and has_one_statistic(tuple(w.shape), grid)):
            scales = scales_of(w, grid, scales)

        def one_pass(
            w: Tensor, scales: Tensor | None, number: Tensor, *others: Tensor
        ) -> list[Tensor]:
            found = scales_of(w, grid) if scales is None else scales
            made = by_group(partial(function, grid=grid, number=number), w, found, grid, *others)
            # Scales as well: what is given back is made once for each group, else again and again.
            return [*made, found]

        run = compiled((function, grid), lambda: one_pass) if is_compiled else one_pass
        as_tensor = torch.tensor(number, dtype=torch.float32, device="cpu")
        return run(w, scales, as_tensor, *(other.to(w.device) for other in others))[:-1]

    def before_update(
        self,
        w: Tensor,
        gradient: Tensor,
        seen: Seen,
        grid: Grid,
        *,
        name: str = "",
        rate: float,
        progress: float = 0.0,
    ) -> None:
        """Once per update and tensor while QAT is on, when the gradient of the loss is there: what
        does not come from the loss. A term of the gradient is added to it, in place; what is
        decoupled from the optimizer moves ``w``, in place, by its learning ``rate``. ``seen`` is
        what the update's forward passes saw.
        """

    def state(self) -> dict[str, Tensor]:
        """What a rule remembers from one update to the next; saved with every checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state, whose tensors are on any device."""


@cache
def rule_kinds() -> dict[str, type[GradientRule]]:
    """Every rule of this folder by the name of its file."""
    names = sorted(found.name for found in iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").RULE for name in names}


def make_rule(name: str, strength: float = 1.0) -> GradientRule:
    """A rule of its own for one run. ValueError if there is no such file, or nothing in it that
    could be stronger."""
    if name not in rule_kinds():
        raise ValueError(f"gradient = {name}: choose from {', '.join(rule_kinds())}")
    rule = rule_kinds()[name]()
    if strength != 1.0:
        if rule.strength is None:
            have = [name for name, kind in rule_kinds().items() if kind.strength is not None]
            raise ValueError(
                f"gradient_strength = {strength:g}: {name} has none; {', '.join(have)} have one"
            )
        rule.strength = strength
    return rule
