"""Promise 10, as far as a CPU shows it: what rounds otherwise on another device is never asked for.

tests/cuda/test_bits.py compares with a GPU, on the same grids and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat.quantize import rounding
from qat.quantize.grid import Grid
from qat.quantize.levels import SCALE_RULES, all_levels
from qat.quantize.rounding import decode, encode, snap
from qat.settings.options import read_grid
from tests.conftest import ROOT

SUMS = ("sigma", "mse", "absmean")  # rules whose scales depend on the order of sums: grid.py


def every_grid() -> dict[str, Grid]:
    """Those of conf/grid, and each format with each rule that does without sums."""
    names = sorted(path.stem for path in (ROOT / "conf/grid").glob("*.yaml"))
    grids = {name: read_grid(name) for name in names}
    for name, levels in all_levels().items():
        for rule in (rule for rule in SCALE_RULES if rule in levels.scale_rules):
            fixed = 0.05 if rule == "fixed" else None
            grid = Grid(name, 4 if name == "int" else None, scale_rule=rule, fixed_scale=fixed)
            ways = [grid, replace(grid, group_size=20), replace(grid, scale_dtype="fp32")]
            ways += [replace(grid, group_size=7, scale_dtype="bf16")]
            ways += [replace(grid, per_tensor=True, scale_dtype="fp32")]
            if rule == "percentile":
                ways += [replace(grid, percentile=q, scale_dtype="fp32") for q in (0.5, 0.98)]
                ways += [replace(grid, scale_floor=1 / 127, code_scale_dtype="fp32")]
            if not levels.multiplies:
                ways += [replace(grid, rotate=16, group_size=20, scale_dtype="fp32")]
            if "refit" in levels.takes and rule != "learned":
                ways += [replace(grid, refit=True, scale_dtype="fp32")]
            grids |= {f"{name} {way.label} {rule}": way for way in ways}
    for bits in (2, 3, 5, 8):
        for dtype in ("fp16", "bf16", "fp32"):
            ranges = {
                r: Grid(bits=bits, range=r, scale_dtype=dtype) for r in ("full", "asymmetric")
            }
            ranges["grouped"] = replace(ranges["asymmetric"], group_size=13)
            grids |= {f"{name} {grid.label}": grid for name, grid in ranges.items()}
    return grids


GRIDS = every_grid()
CLAIMING = {name: grid for name, grid in GRIDS.items() if grid.scale_rule not in SUMS}


class Masters(NamedTuple):
    """A tensor to round; its scales where they are learned or given."""

    weights: Tensor
    scales: Tensor | None

    def on(self, device: str) -> Masters:
        return Masters(*(None if t is None else t.to(device) for t in self))


def hard_weights(grid: Grid) -> dict[str, Masters]:
    """Ties, subnormals, huge, tiny and zero rows, odd last groups; finite once they are stored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    has_fp16 = "fp16" in (grid.scale_dtype, grid.code_scale_dtype)
    huge = 1e4 if has_fp16 or grid.scale_rule in SUMS else 1e37
    rows = 0.1 * draw(400, 77)
    rows[1], rows[2], rows[3] = 0.0, -0.25, rows[3].abs().max() * rows[3].sign()
    rows[4:20] *= 10.0 ** -torch.arange(1, 17)[:, None]  # scales below what fp16 holds
    rows[20:60] *= 10.0 ** -torch.linspace(30, 45, 40)[:, None]  # weights below what float32 holds
    rows[60:80] *= huge * torch.linspace(0.1, 1.0, 20)[:, None]
    rows[80, 0], rows[81], rows[82] = 7.0, 1e-41, -0.0
    rows[83], rows[84] = rows[83].abs(), -rows[84].abs()  # zero points at the ends
    rows[85], rows[85, ::2] = 0.0, -0.0
    rows[86], rows[86, 1::3], rows[86, 2::3] = rows[86].abs(), 0.0, -0.0
    codes = torch.arange(grid.table.codes[0], grid.table.codes[1] + 1).char()
    levels = grid.table.from_codes(codes)
    levels = levels[levels.isfinite()].unique()
    between = (levels[1:] + levels[:-1]) / 2
    ties = torch.cat([levels, between])[None] * torch.tensor([2.0**-5, 0.03, 1 / 3])[:, None]
    made = {
        "rows": rows, "ties": ties, "long": draw(3, 5000), "vector": draw(70), "single": draw(9, 1),
        "cube": draw(6, 5, 7), "pair": draw(8, 2),
    }  # fmt: skip
    masters = {}
    for name, w in made.items():
        scales = None
        if grid.scale_rule in ("given", "learned"):
            scales = torch.rand(grid.scales_shape(tuple(w.shape)), generator=generator) * 0.05
            scales[-1] = 0.0
        masters[name] = Masters(w, scales)
    return masters


def bits(t: Tensor) -> Tensor:
    """To compare by: zeros have signs."""
    return t.cpu().contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.int8}[t.itemsize])


def rounded(w: Masters, grid: Grid) -> list[Tensor]:
    """All that a grid makes of a tensor: codes, scales, zero points, weights; as bits."""
    coded = encode(w.weights, grid, w.scales)
    made = [*coded, decode(coded, grid), snap(w.weights, grid, w.scales)]
    return [bits(t) for t in made if t is not None]


def differences(
    grid: Grid, here: Callable[[Masters], list[Tensor]], there: Callable[[Masters], list[Tensor]]
) -> list[str]:
    """Where two ways to round give other bits."""
    found = []
    for name, w in hard_weights(grid).items():
        for part, (a, b) in enumerate(zip(here(w), there(w), strict=True)):
            if not torch.equal(a, b):
                found.append(f"{name}, part {part}: {int((a != b).sum())} of {a.numel()}")
    return found


class _AsElsewhere(TorchDispatchMode):
    """Operations that devices round in two ways, in the other way than this CPU; ``asked``."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        name, x = str(function), args[0] if args else None
        if function in (aten.div.Tensor, aten.div_.Tensor) and not isinstance(args[1], Tensor):
            self.asked.append(name)
            multiply = aten.mul_.Tensor if function is aten.div_.Tensor else aten.mul.Tensor
            return multiply(x, float(1 / torch.tensor(float(args[1]))))
        if function in (aten.amax.default, aten.amin.default):  # of 0 and -0 they give either
            return function(x.flip(-1), *args[1:], **(kwargs or {}))
        if "lerp" in name:  # with a fused multiply-add on this CPU
            self.asked.append(name)
            share = args[2]
            return (
                x + (args[1] - x) * share if share < 0.5 else args[1] - (args[1] - x) * (1 - share)
            )
        if any(word in name for word in ("mean", "std", "var", "addc", "mm.", "addmv", "dot")):
            self.asked.append(name)
        return function(*args, **(kwargs or {}))


def elsewhere(grid: Grid, asked: list[str]) -> Callable[[Masters], list[Tensor]]:
    def there(w: Masters) -> list[Tensor]:
        with _AsElsewhere() as mode:
            made = rounded(w, grid)
        asked.extend(mode.asked)
        return made

    return there


@pytest.mark.parametrize("name", CLAIMING)
def test_nothing_that_devices_round_in_two_ways_is_asked_for(name: str) -> None:
    grid, asked = CLAIMING[name], list[str]()
    assert differences(grid, lambda w: rounded(w, grid), elsewhere(grid, asked)) == []
    assert asked == []
    finite = [snap(w.weights, grid, w.scales).isfinite().all() for w in hard_weights(grid).values()]
    assert all(finite)


def test_the_check_above_sees_a_reciprocal_and_a_lerp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted faults."""
    reciprocal = Grid(bits=4, scale_dtype="fp32")
    zero_point = Grid(bits=4, range="asymmetric", scale_dtype="fp32")
    lerp = Grid(bits=4, scale_rule="percentile", percentile=0.98, scale_dtype="fp32")
    for fault, plain, grids in (
        ("quotient", lambda x, divisor: x / divisor, (reciprocal, zero_point)),
        ("between", torch.lerp, (lerp,)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(rounding, fault, plain)
            for grid in grids:
                asked = list[str]()
                assert differences(grid, lambda w, g=grid: rounded(w, g), elsewhere(grid, asked))
                assert asked


def test_the_check_above_sees_a_rotation_by_a_matrix_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted fault: sums whose order is the device's."""

    def by_product(blocks: Tensor) -> None:
        size = blocks.size(-1)
        blocks.copy_(blocks @ torch.eye(size).flip(0) * size**-0.5)

    grid, asked = Grid(bits=4, rotate=16), list[str]()
    monkeypatch.setattr(rounding, "_multiply_by_hadamard_", by_product)
    differences(grid, lambda w: rounded(w, grid), elsewhere(grid, asked))
    assert asked
