"""Grids that rotate: an orthonormal Hadamard matrix around plain rounding, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from qat.errors import UserError
from qat.model.spec import ModelSpec
from qat.quantize import rounding
from qat.quantize.gradients import rule_kinds
from qat.quantize.grid import ROTATED_COLUMNS, Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.rounding import encode, rotated, snap
from qat.quantize.switch import QatSwitch
from qat.settings.schema import PlanSettings
from qat.training.build import plan_of
from qat.training.liveness import measure_gradients

INT4 = Grid(bits=4)
H16 = Grid(bits=4, rotate=16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(columns: int, size: int) -> Tensor:
    """The whole rotation of a row, (columns, columns) float64: blocks of ``size``, then of the
    largest powers of two that fit."""
    blocks, left = [], columns
    while left:
        block = min(size, 2 ** int(math.log2(left)))
        blocks.append(torch.from_numpy(hadamard(block) / math.sqrt(block)))
        left -= block
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("size", ROTATED_COLUMNS)
@pytest.mark.parametrize("columns", [1, 5, 288, 1300])
def test_it_is_the_orthonormal_matrix_of_hadamard(columns: int, size: int) -> None:
    grid, w = Grid(bits=4, rotate=size), drawn(3, columns)
    whole = matrix(columns, size)
    assert torch.allclose(whole @ whole.T, torch.eye(columns, dtype=torch.float64))
    assert torch.allclose(rotated(w.double(), grid), w.double() @ whole)
    assert torch.allclose(rotated(w, grid).double(), w.double() @ whole, atol=2e-6)
    assert torch.allclose(rotated(rotated(w, grid), grid), w, atol=3e-6)


def test_288_columns_are_nine_blocks_of_32_or_one_of_256_and_one_of_32() -> None:
    w = drawn(2, 288)
    nine = rotated(w.view(18, 32), Grid(bits=4, rotate=32)).view(2, 288)
    assert torch.equal(rotated(w, Grid(bits=4, rotate=32)), nine)
    large, small = w[:, :256], w[:, 256:]
    one = [rotated(part.contiguous(), Grid(bits=4, rotate=256)) for part in (large, small)]
    assert torch.equal(rotated(w, Grid(bits=4, rotate=256)), torch.cat(one, dim=1))


def test_bits_are_those_of_butterflies_and_one_product() -> None:
    """Scalar by scalar: stage after stage neighbours 1, 2, 4, ... apart, then one rounding."""
    grid, w = Grid(bits=4, rotate=32), drawn(4, 32) * 3.7
    for row, found in zip(w.numpy(), rotated(w, grid).numpy(), strict=True):
        x = list(row)
        for half in (1, 2, 4, 8, 16):
            for i in (i for i in range(32) if not i & half):
                x[i], x[i + half] = x[i] + x[i + half], x[i] - x[i + half]
        assert np.array_equal(np.array(x) * np.float32(32**-0.5), found)


@pytest.mark.parametrize("shape", [(70,), (9, 100), (5, 6, 7), (300, 3), (0, 8), (1, 4000)])
def test_bits_do_not_depend_on_parts_or_layout(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = drawn(*shape)
    whole = rotated(w, H16)
    before = w.clone()
    assert torch.equal(rotated(nn.Parameter(w.clone()), H16), whole)
    for one, other in ((0, -1), (-2, -1) if w.dim() > 2 else (0, -1)):
        turned = w.transpose(one, other).contiguous().transpose(one, other)
        assert torch.equal(rotated(turned, H16), whole)
    monkeypatch.setattr(rounding, "ROTATED_AT_ONCE", 64)
    assert torch.equal(rotated(w, H16), whole)
    assert torch.equal(w, before)
    if w.numel():
        assert whole.flatten(1 if w.dim() > 1 else 0).norm() == pytest.approx(float(w.norm()))
        assert not torch.equal(whole, w)


def test_zero_has_no_sign() -> None:
    """Also where what is decoded is too small for float32."""
    snapped = snap(drawn(20, 64) * 2e-45, Grid(bits=4, scale_dtype="fp32", rotate=64))
    assert (snapped < 0).any()
    assert (snapped == 0).any()
    assert not (snapped.signbit() & (snapped == 0)).any()


def test_codes_and_scales_are_those_of_rotated_weights() -> None:
    w = drawn(6, 100)
    for plain in (INT4, Grid("nf4", group_size=20), Grid(bits=4, range="asymmetric")):
        turned = Grid(**plain.as_json(), rotate=32)
        assert turned.unrotated == plain
        assert turned.label == f"{plain.label}_h32"
        ours, theirs = encode(w, turned), encode(rotated(w, turned), plain)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)
        expected = snap((w.double() @ matrix(100, 32)).float(), plain).double() @ matrix(100, 32)
        off = (snap(w, turned) - expected).abs() > 1e-5  # where float32 tipped a code
        assert off.float().mean() < 0.02


@pytest.mark.parametrize("plain", [INT4, Grid(bits=4, group_size=64), Grid("nf4", group_size=64)])
def test_outliers_cost_less(plain: Grid) -> None:
    """Two columns 30 times as large as the others: what rotations are for."""
    w = drawn(64, 256)
    w[:, [3, 130]] *= 30.0
    turned = Grid(**plain.as_json(), rotate=128)
    assert (snap(w, turned) - w).norm() < 0.7 * (snap(w, plain) - w).norm()


def seen_and_gradient(rule: str, w: Tensor, grid: Grid, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(seen, dL/dw, dL/dscale) of L = sum(c * seen), through the switch."""
    plan = build_plan({"w": tuple(w.shape)}, {"grid": grid}, {"*": "grid"})
    switch, master = QatSwitch(plan, rule), nn.Parameter(w.clone())
    switch.refresh({"w": master}, True, progress=0.5)
    seen = switch.weights({"w": master})["w"]
    (c * seen).sum().backward()
    assert master.grad is not None
    scale = next(iter(switch.parameters()), None)
    return seen.detach(), master.grad, torch.zeros(()) if scale is None else scale.grad


def test_identity_passes_gradients_and_so_does_clipped_where_nothing_is_clipped() -> None:
    w, c = drawn(6, 100), drawn(6, 100, seed=1)
    seen, grad, _ = seen_and_gradient("identity", w, H16, c)
    assert torch.equal(seen, snap(w, H16))
    assert torch.equal(grad, c)
    clipped, passed, _ = seen_and_gradient("clipped", w, H16, c)  # amax: no code is clamped
    assert torch.equal(clipped, seen)
    assert torch.allclose(passed, c, atol=1e-6)


def test_clipped_masks_rotated_gradients() -> None:
    grid = Grid(bits=4, scale_rule="sigma", sigma=2.0, group_size=10, scale_dtype="fp32", rotate=16)
    w, c, whole = drawn(6, 25), drawn(6, 25, seed=1), matrix(25, 16)
    seen, grad, _ = seen_and_gradient("clipped", w, grid, c)
    assert torch.equal(seen, snap(w, grid))
    scales = encode(w, grid).scales.repeat_interleave(10, 1)[:, :25]
    inside = (w.double() @ whole / scales).abs() <= 7.5
    assert 0.5 < inside.float().mean() < 1
    assert torch.allclose(grad.double(), (c.double() @ whole * inside) @ whole, atol=1e-6)


def test_learned_scales_learn_from_rotated_gradients() -> None:
    """The formula of LSQ by autograd through explicit matrices, with codes held."""
    grid = Grid(bits=3, scale_rule="learned", group_size=10, scale_dtype="fp32", rotate=16)
    w, c, whole = drawn(6, 25), drawn(6, 25, seed=1), matrix(25, 16)
    seen, grad, of_scale = seen_and_gradient("identity", w, grid, c)
    assert torch.equal(seen, snap(w, grid))
    scale = encode(w, grid).scales.double().requires_grad_()
    free = w.double().requires_grad_()
    sizes = torch.tensor([10, 10, 5])
    spread = scale.repeat_interleave(sizes, 1)
    x = free @ whole / spread
    held = torch.where(x.abs() < 3 - 1e-6, x, 3 * x.detach().sign())
    level = held + (held.round() - held).detach()  # straight through the rounding, not the clamp
    (c * (level * spread @ whole)).sum().backward()
    assert scale.grad is not None
    assert free.grad is not None
    assert torch.allclose(grad.double(), free.grad, atol=1e-5)
    assert torch.allclose(of_scale.double(), scale.grad / (sizes * 3).sqrt(), atol=1e-5)


TAKE_ROTATED = sorted(rule for rule, kind in rule_kinds().items() if kind.takes_rotated)


@pytest.mark.parametrize("rule", [rule for rule in TAKE_ROTATED if rule != "learned"])
def test_every_rule_works_between_two_rotations(rule: str) -> None:
    """What it shows the model is what it makes of rotated weights on the grid without, rotated."""
    w, c = drawn(6, 96), drawn(6, 96, seed=1)
    seen, grad, _ = seen_and_gradient(rule, w, H16, c)
    turned, passed, _ = seen_and_gradient(rule, rotated(w, H16), INT4, rotated(c, H16))
    assert torch.allclose(rotated(seen, H16), turned, atol=2e-6)
    assert torch.allclose(rotated(grad, H16), passed, atol=2e-6)
    assert not torch.allclose(seen, snap(w, INT4), atol=1e-3)


def test_liveness_sees_what_cannot_move_after_rotation() -> None:
    """A slope that stops the largest rotated weight of every group: masters' gradients are not 0
    for that, but no group's largest moves."""
    grid = Grid(bits=4, group_size=16, rotate=16)
    plan = build_plan({"w": (8, 64)}, {"grid": grid}, {"*": "grid"})
    master = nn.Parameter(drawn(8, 64))
    groups = rotated(master.detach(), grid).view(8, 4, 16).abs()
    stuck = (groups < groups.amax(-1, keepdim=True)).float().view(8, 64)
    for slope, movable, nonzero in ((None, 1.0, 1.0), (stuck, 0.0, 15 / 16)):
        switch = QatSwitch(plan)
        switch.refresh({"w": master}, True)
        switch._seen["w"] = switch._seen["w"]._replace(slope=slope)
        loss = (switch.weights({"w": master})["w"] * drawn(8, 64, seed=1)).sum()
        assert measure_gradients(loss, {"w": master}, plan) == (nonzero, movable, [])


SPEC = ModelSpec(48, 1, 32, 4, 2, 2, True)
RULES = {"*.weight": "grid", "*": "fp32"}


def test_plan_rotate_is_of_every_matrix() -> None:
    rules = {"*.mlp.*": "wide"} | RULES
    settings = PlanSettings(rules, {"wide": Grid("nf4", group_size=8)}, rotate=8)
    grids = {entry.grid for entry in plan_of(SPEC, INT4, settings).on_grid}
    assert grids == {Grid(bits=4, rotate=8), Grid("nf4", group_size=8, rotate=8)}
    plan = plan_of(SPEC, INT4, settings)
    assert Plan.from_json(plan.as_json()) == plan
    plain = PlanSettings(settings.rules, settings.grids)
    assert plan.packed_bytes == plan_of(SPEC, INT4, plain).packed_bytes


COLUMNS = Grid(bits=8, scale_rule="learned", scale_dtype="bf16", column_scales=True)


@pytest.mark.parametrize(
    ("grid", "rotate", "message"),
    [
        (INT4, 3, "plan.rotate = 3: give a power of two from 2 to 1024, or null"),
        (INT4, 2048, "plan.rotate = 2048: give a power of two from 2 to 1024, or null"),
        (Grid("q4_0", group_size=32), 32, "plan.rotate = 32: not of q4_0 levels; give null"),
        (COLUMNS, 32, "plan.rotate = 32: not of column_scales; give null"),
        (H16, None, "grid.rotate = 16: give plan.rotate, of all matrices"),
    ],
)
def test_what_cannot_be_rotated_is_said(grid: Grid, rotate: int | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(SPEC, grid, PlanSettings(RULES, rotate=rotate))
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [3, 0, 1, -32, 2**40, True, "8", 8.0, [8]])
def test_headers_are_not_believed(value: object) -> None:
    assert Grid.from_json({"bits": 4, "rotate": 8}).rotate == 8
    assert Grid.from_json({"bits": 4}).rotate is None  # of a file from before
    with pytest.raises(ValueError, match="rotate"):
        Grid.from_json({"bits": 4, "rotate": value})
