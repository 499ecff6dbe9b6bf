"""The QAT switch: master weights -> the weights the model sees.

The model takes its weights as inputs, so fake quantization never enters its graph: while the switch
is off it sees the masters, while it is on what the gradient rule makes of them, computed once per
optimizer step outside the model. Both go through the same per-tensor autograd node, so that the
compiled model cannot tell them apart (no recompile at the switch) and gradients reach each master
on its own (DDP overlaps its all-reduce).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.compiled import make_room
from qat.quantize.fused import FusedSnap
from qat.quantize.gradients import GradientRule, Seen, make_rule
from qat.quantize.gradients.learned import Learned, sum_per_scale
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import encode, rotated


class _StraightThrough(torch.autograd.Function):
    """(master, learned scale or None, seen, slopes) -> seen; gradients as the rule says."""

    @staticmethod
    def forward(ctx, master, scale, weight, slope, scale_slope, grid) -> Tensor:
        ctx.grid, ctx.scale_like = grid, scale
        ctx.save_for_backward(slope, scale_slope)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        slope, scale_slope = ctx.saved_tensors
        to_master = gradient
        if slope is not None:
            gradient = rotated(gradient, ctx.grid)
            to_master = rotated(gradient * slope, ctx.grid)
        to_scale = None
        if ctx.scale_like is not None:  # a zero gradient while off: DDP waits for every parameter
            to_scale = (
                torch.zeros_like(ctx.scale_like)
                if scale_slope is None
                else sum_per_scale(gradient * scale_slope, ctx.grid, ctx.scale_like)
            )
        return to_master, to_scale, None, None, None, None


def _key(name: str) -> str:
    """Parameter names of modules may not hold dots."""
    return name.replace(".", "/")


class QatSwitch(nn.Module):
    """Gives the weights for the next forward pass; call ``refresh`` after every optimizer step.

    Its only parameters are learned scales, which exist if a grid of the plan has
    scale_rule=learned; they are found by that grid's rule when QAT is first switched on. ``fused``
    snaps all tensors in one compiled pass: the same bits, sooner.
    """

    def __init__(
        self,
        plan: Plan,
        rule: str | GradientRule = "identity",
        seed: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.gradient = make_rule(rule) if isinstance(rule, str) else rule
        for entry in plan.on_grid:
            assert entry.grid is not None
            rotates = entry.grid.rotate is not None
            if not self.gradient.supports(entry.grid) or rotates > self.gradient.takes_rotated:
                name = type(self.gradient).__module__.rpartition(".")[2]
                raise ValueError(f"gradient = {name}: not for {entry.grid.label}")
        if fused:
            make_room()
        self._of_scales = Learned()
        self.gradient.compiles = self._of_scales.compiles = fused
        self.plan, self.seed = plan, seed
        self.is_on = False
        self._fused = FusedSnap(plan) if fused and self.gradient.snaps_only else None
        self._seen: dict[str, Seen] = {}
        self.has_scales = False
        self._learned = nn.ParameterDict(
            {
                _key(entry.name): nn.Parameter(torch.zeros(entry.scales_shape))
                for entry in plan.on_grid
                if entry.grid is not None and entry.grid.scale_rule == "learned"
            }
        )

    @property
    def learned_scales(self) -> dict[str, Tensor]:
        """Tensor name -> its learned scales (rows, groups); empty until QAT was switched on."""
        if not self.has_scales:
            return {}
        return {name.replace("/", "."): scale for name, scale in self._learned.items()}

    @torch.no_grad()
    def refresh(
        self,
        masters: Mapping[str, Tensor],
        is_on: bool,
        step: int = 0,
        progress: float = 0.0,
        blend: float = 1.0,
    ) -> None:
        """Prepare the next forward pass; with QAT off nothing is computed.

        ``step`` seeds the noise, ``progress`` (0 to 1) anneals soft rounding, ``blend`` mixes
        masters (0) and seen weights (1).
        """
        self.is_on = is_on
        self._seen = {}
        if not is_on:
            return
        if not self.has_scales:
            self._find_scales(masters)
        snapped = self._fused(masters) if self._fused is not None else {}
        for entry in self.plan:
            if entry.name in snapped:
                seen = Seen(snapped[entry.name])
            else:
                seen = self._see(entry, masters[entry.name].detach(), step, progress)
            if blend < 1.0:
                seen = seen._replace(weight=masters[entry.name].detach().lerp(seen.weight, blend))
            self._seen[entry.name] = seen

    def _see(self, entry: Entry, w: Tensor, step: int, progress: float) -> Seen:
        if entry.grid is None:
            return Seen(entry.snap(w))
        generator = None
        if self.gradient.draws:  # equal on every rank, other for every tensor and step
            generator = torch.Generator(w.device)
            generator.manual_seed(zlib.crc32(f"{self.seed} {step} {entry.name}".encode()))
        scales = self.learned_scales.get(entry.name)
        rule = self.gradient if scales is None else self._of_scales
        seen = rule.see(
            rotated(w, entry.grid), entry.grid.unrotated, name=entry.name, scales=scales,
            progress=progress if rule.anneals else 0.0, generator=generator,
        )  # fmt: skip
        return seen._replace(weight=rotated(seen.weight, entry.grid))

    @torch.no_grad()
    def before_update(
        self, masters: Mapping[str, Tensor], rates: Mapping[str, float], progress: float = 0.0
    ) -> None:
        """What the rule does beside the loss: gradients of the masters are in place, and ``rates``
        are their learning rates by name. With QAT off nothing is done."""
        if not (self.is_on and self.gradient.pulls):
            return
        for entry in self.plan.on_grid:
            master = masters[entry.name]
            if entry.name in self.learned_scales or master.grad is None:
                continue
            assert entry.grid is not None
            self.gradient.before_update(
                master.detach(), master.grad, self._seen[entry.name], entry.grid,
                name=entry.name, rate=rates[entry.name],
                progress=progress if self.gradient.anneals else 0.0,
            )  # fmt: skip

    def _find_scales(self, masters: Mapping[str, Tensor]) -> None:
        self.has_scales = True
        for name, scales in self.learned_scales.items():
            grid = self.plan.entries[name].grid
            assert grid is not None
            scales.copy_(encode(masters[name].detach(), grid).scales.float())

    @torch.no_grad()
    def set_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Take up learned scales; without any they are found anew at the next switch-on."""
        self.has_scales = bool(scales)
        for name, found in scales.items():
            self._learned[_key(name)].copy_(found)

    def weights(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> weight as the model sees it, with gradients passing to the master."""
        return {name: self._apply_rule(name, master) for name, master in masters.items()}

    def _apply_rule(self, name: str, master: Tensor) -> Tensor:
        seen = self._seen.get(name) or Seen(master.detach())
        scales = self._learned.get(_key(name))
        grid: Grid | None = self.plan.entries[name].grid
        return _StraightThrough.apply(
            master, scales, seen.weight, seen.slope, seen.scale_slope, grid
        )


@torch.no_grad()
def on_grid_share(
    seen: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
    plan: Plan,
    scales: Mapping[str, Tensor] | None = None,
) -> float:
    """Share of the elements planned for a grid whose seen value is the one a file would store.

    A tensor that was not seen at all counts as off its grid.
    """
    total = matching = 0
    for entry in plan.on_grid:
        stored = entry.snap(masters[entry.name].detach(), (scales or {}).get(entry.name))
        total += entry.num_elements
        if entry.name in seen:
            matching += int((seen[entry.name] == stored).sum())
    return matching / total
