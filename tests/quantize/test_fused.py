"""The fused snap has the bits of the plain one, whatever computes its passes."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor

from qat.compiled import forget
from qat.quantize import fused as fused_module
from qat.quantize.fused import FusedSnap, has_kernel
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan, build_plan
from qat.quantize.rounding import nearest_float
from qat.quantize.switch import QatSwitch
from tests.conftest import compiles, needs_triton, run_with_triton

GRIDS = {
    "percentile": Grid(bits=8, scale_rule="percentile"),
    "golf": Grid(bits=8, scale_rule="percentile", scale_floor=1 / 127, code_scale_dtype="fp32"),
    "int6": Grid(bits=6),
    "step_bf16": Grid(bits=3, scale_dtype="bf16"),
    "step_fp32": Grid(bits=5, scale_dtype="fp32", range="full"),
    "grouped": Grid(bits=4, group_size=64),
    "ragged": Grid(bits=4, group_size=7, range="asymmetric"),
    "tensor": Grid(bits=8, per_tensor=True),
    "amax_ternary": Grid("ternary"),
    "median": Grid(bits=4, scale_rule="percentile", percentile=0.5),  # sorts: not fused
    "sdclip": Grid(bits=6, scale_rule="sigma"),
    "absmean": Grid("ternary", scale_rule="absmean", refit=True),
    "fp8": Grid("fp8_e4m3"),
    "fp8_e5m2": Grid("fp8_e5m2"),
    "mxfp8": Grid("fp8_e4m3", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "nf4": Grid("nf4", group_size=64),
    "mxfp4": Grid("e2m1", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "mxfp6": Grid("e2m3", group_size=32, scale_dtype="e8m0"),
    "mxfp6_e3m2": Grid("e3m2", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "nvfp4": Grid("e2m1", group_size=16, scale_dtype="e4m3"),
    "int2_seq": Grid("int2_seq"),
    "rotated": Grid(bits=4, rotate=32),
    "rotated_groups": Grid(bits=4, group_size=7, range="asymmetric", rotate=8),
    "q4_0": Grid("q4_0", group_size=32),
    "q4_1": Grid("q4_1", group_size=32),
    "q5_0": Grid("q5_0", group_size=32),
    "q5_1": Grid("q5_1", group_size=32),
    "q8_0": Grid("q8_0", group_size=32),
}
NOT_FUSABLE = {"median", "sdclip", "absmean"}
SIZES = {"wide": (9, 1500), "rows": (9, 64), "one": (9, 1), "odd": (9, 13), "vector": (70,)}


def weights() -> dict[str, Tensor]:
    """Every grid over every shape, with rows that are zero, constant, tied, tiny, huge."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name in GRIDS:
        for size, shape in SIZES.items():
            w = torch.randn(shape, generator=generator) * 0.1
            if w.dim() == 2:
                w[1], w[2], w[3] = 0.0, -0.25, w[3].abs().max() * w[3].sign()
                w[4] *= 1e-6
                w[5] *= 1e4
                w[6, 0] = 7.0
                w[7] = 1e-41
            made[f"{name}.{size}"] = w
    return made | {"plain": torch.randn(5, generator=generator)}


def plan_of(masters: dict[str, Tensor]) -> Plan:
    shapes = {name: tuple(w.shape) for name, w in masters.items()}
    return build_plan(shapes, GRIDS, {f"{name}.*": name for name in GRIDS} | {"*": "fp16"})


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


FUSED = set(GRIDS) - NOT_FUSABLE
WITH_KERNEL = {g for g in FUSED if has_kernel(Entry("w", (9, 64), GRIDS[g]))}


def check(
    fused: FusedSnap, masters: dict[str, Tensor], plan: Plan, names: set[str] = FUSED
) -> None:
    for _ in range(2):  # again with other weights, into the same buffers
        snapped, stored = fused(masters), plan.snap(masters)
        assert {g for g in GRIDS if f"{g}.wide" in snapped} == names
        wrong = [name for name, w in snapped.items() if not same_bits(w, stored[name])]
        assert not wrong
        masters = {name: w.flip(0) * 0.7 for name, w in masters.items()}


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "compiled", lambda key, make: make())


@pytest.mark.usefixtures("not_compiled")
def test_what_is_compiled_in_plain_torch() -> None:
    masters = weights()
    check(FusedSnap(plan_of(masters)), masters, plan_of(masters))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "nf4"])
def test_levels_as_they_are_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level, the ties between neighbours, what is next to these, and beyond the last."""
    table = Grid(name).table
    codes = torch.arange(-128, 128) if name != "nf4" else torch.arange(-7, 9)
    levels = table.from_codes(codes.char())
    levels = levels[levels.isfinite()].sort().values
    ties = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([levels, ties, ties.nextafter(ties * 2), ties.nextafter(ties / 2), levels * 1.7])
    expected = table.nearest(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(table.nearest(x), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_float_dtype_by_arithmetic(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the dtype, the ties between neighbours, what is next to these, and beyond."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(torch.float16 if dtype == "fp16" else torch.bfloat16).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] / 2 + numbers[:-1] / 2)[numbers.diff() > 0]
    ends = torch.tensor([65519.9, 65520.0, 1e6, 1e-9, 3e38])
    x = torch.cat([numbers, ties, ties.nextafter(ties * 2), ties.nextafter(ties / 2), ends, -ends])
    expected = nearest_float(x, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(nearest_float(x, dtype), expected)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on a CPU; there is none",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled() -> None:
    forget()
    masters = weights()
    check(FusedSnap(plan_of(masters)), masters, plan_of(masters))
    forget()


@needs_triton
def test_triton_kernels() -> None:
    run_with_triton(__name__, "triton_check")


def triton_check() -> None:
    from qat.quantize.triton_kernels import TritonSnap

    device = "cuda" if torch.cuda.is_available() else "cpu"
    masters = {name: w.to(device) for name, w in weights().items()}
    fused = FusedSnap(plan_of(masters))
    fused._entries = [entry for entry in fused._entries if has_kernel(entry)]
    fused._made_for = lambda w: TritonSnap(w, fused._entries)  # type: ignore[method-assign]
    check(fused, masters, plan_of(masters), WITH_KERNEL)


@pytest.mark.usefixtures("not_compiled")
def test_the_switch_gives_the_same_weights_fused_or_not() -> None:
    masters = {name: w.requires_grad_() for name, w in weights().items()}
    plain, fused = QatSwitch(plan_of(masters)), QatSwitch(plan_of(masters), fused=True)
    for switch in (plain, fused):
        switch.refresh(masters, is_on=True, blend=0.5)
    a, b = plain.weights(masters), fused.weights(masters)
    assert all(same_bits(a[name].detach(), b[name].detach()) for name in masters)
    sum(w.sum() for w in b.values()).backward()
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in masters.values())
