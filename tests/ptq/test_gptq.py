"""GPTQ against a dense solver that knows no trick, and its promises on every grid."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from qat.ptq import gptq, methods
from qat.ptq.awq import awq
from qat.ptq.gptq import BitPrices, GptqFactor, rotated_hessian
from qat.ptq.layer_inputs import LayerInputs
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry
from qat.quantize.rounding import (
    SCALE_DTYPES,
    Codes,
    decode,
    encode,
    rotated,
    snap,
    weighted_scales,
)
from tests.quantize.test_grid import given_scales, grids


def correlated(columns: int, seed: int, tokens: int = 400) -> Tensor:
    """The second moment of inputs that hang together, channels up to 100 times as large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    size = torch.logspace(-1, 1, columns, dtype=torch.float64)
    size = size[torch.randperm(columns, generator=generator)]
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix * size
    return x.T @ x / tokens


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def trace(stored: Tensor, w: Tensor, hessian: Tensor) -> Tensor:
    """E H E^T of each row."""
    error = stored.double() - w.double()
    return torch.einsum("ri,ij,rj->r", error, hessian.double(), error)


def dense_brain_surgeon(
    w: Tensor, hessian: Tensor, damping: float, act_order: bool, coded: Codes, grid: Grid
) -> Tensor:
    """Optimal brain quantization, a column at a time: the inverse of what remains, each time anew.

    ``coded`` brings the levels. (rows, columns) float64 weights, the better of these and nearest.
    """
    rows, columns = w.shape
    low, high = grid.table.limits
    size = grid.group_size or columns
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(columns)
    remaining = list(range(columns))
    if act_order:
        remaining.sort(key=lambda j: -float(hessian[j, j]))
    moved, stored = w.double().clone(), torch.zeros(rows, columns, dtype=torch.float64)
    while remaining:
        j = remaining[0]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        scale = coded.scales[:, j // size].float()
        zero = 0.0 if coded.zeros is None else coded.zeros[:, j // size].float()
        code = ((moved[:, j].float() / scale).round() + zero).clamp(low, high)
        stored[:, j] = ((code - zero) * scale).double()
        error = (moved[:, j] - stored[:, j]) / inverse[0, 0]
        moved[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    nearest = decode(coded, grid).double()
    is_better = trace(stored, w, hessian) < trace(nearest, w, hessian)
    return torch.where(is_better[:, None], stored, nearest)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(bits=4),
        Grid(bits=3, group_size=12),
        Grid(bits=2, scale_rule="mse"),
        Grid(bits=6, per_tensor=True, scale_dtype="fp32"),
        Grid(bits=4, range="asymmetric", group_size=25),
        Grid("ternary", scale_rule="absmean", refit=True),
    ],
    ids=lambda grid: grid.label,
)
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_it_is_the_dense_solver(grid: Grid, act_order: bool, damping: float) -> None:
    w, hessian = normal(24, 90, 1), correlated(90, 2)  # 90: two blocks of columns, the last short
    ours = GptqFactor(hessian, damping, act_order).quantize(w, grid)
    nearest = encode(w, grid)
    assert torch.equal(ours.scales, nearest.scales)
    expected = dense_brain_surgeon(w, hessian, damping, act_order, nearest, grid)
    assert torch.allclose(decode(ours, grid).double(), expected, rtol=0, atol=1e-5)
    assert not torch.equal(ours.codes, nearest.codes)


@given(grids(), st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_it_is_never_worse_than_rounding(
    grid: Grid, rows: int, columns: int, seed: int, act_order: bool
) -> None:
    """Of every row, on every grid, with few tokens (a singular hessian) and unused inputs."""
    w = normal(rows, columns, seed)
    w[:, seed % columns] *= 30.0  # an outlier: codes at their limits, errors with nowhere to go
    hessian = correlated(columns, seed, tokens=1 + seed % 60)
    unused = seed % 7 % columns
    hessian[unused], hessian[:, unused] = 0.0, 0.0
    scales = given_scales(w, grid)
    factor = GptqFactor(rotated_hessian(hessian, grid), 0.01, act_order)
    ours = factor.quantize(rotated(w, grid), grid.unrotated, scales)
    nearest = encode(w, grid, scales)
    assert ours.codes.dtype == torch.int8
    assert ours.scales.dtype == SCALE_DTYPES[grid.scale_dtype]
    assert tuple(ours.scales.shape) == grid.scales_shape(tuple(w.shape))
    error, bound = (trace(decode(c, grid), w, hessian) for c in (ours, nearest))
    rounding = 1e-9 if grid.rotate is None else 1e-4  # rotating back rounds what was compared
    assert (error <= bound * (1 + rounding) + 1e-300).all()


def test_without_the_better_row_it_would_be_worse() -> None:
    """The test above can fail: feeding errors on does lose rows where codes are clamped."""
    w, hessian = normal(64, 48, 3), correlated(48, 4)
    grid = Grid(bits=2, scale_rule="given")
    nearest = encode(w, grid, torch.full((64, 1), 0.01))
    fed = nearest._replace(codes=GptqFactor(hessian)._fed_codes(w, grid, nearest, None))
    error, bound = (trace(decode(c, grid), w, hessian) for c in (fed, nearest))
    assert 0 < int((error > bound).sum()) < 64


@given(grids(), st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_inputs_that_do_not_hang_together_leave_rounding(
    grid: Grid, rows: int, columns: int, seed: int, act_order: bool
) -> None:
    """A diagonal hessian: each weight is at the nearest level that its stored scale decodes to."""
    grid = grid.unrotated
    w = normal(rows, columns, seed)
    diagonal = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    diagonal[seed % columns] = 0.0
    scales = given_scales(w, grid)
    ours = GptqFactor(torch.diag(diagonal), 0.01, act_order).quantize(w, grid, scales)
    nearest = encode(w, grid, scales)
    rounds_by_another = grid.code_scale_dtype or grid.refit or grid.scale_floor
    rounds_by_product = grid.table.multiplies or grid.has_tensor_scale
    if not rounds_by_another and not rounds_by_product:
        assert torch.equal(ours.codes, nearest.codes)
    else:  # encode rounds by another scale than it stores
        error, bound = (decode(c, grid).sub(w).abs().sum() for c in (ours, nearest))
        assert error <= bound * (1 + 1e-5)


@pytest.mark.parametrize("block_columns", [1, 7, 90, 1000])
def test_codes_do_not_depend_on_the_block(
    block_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, grid = normal(16, 90, 1), Grid(bits=3, group_size=16)
    factor = GptqFactor(correlated(90, 2), act_order=True)
    expected = factor.quantize(w, grid)
    monkeypatch.setattr(gptq, "BLOCK_COLUMNS", block_columns)
    assert torch.equal(factor.quantize(w, grid).codes, expected.codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_unused_inputs_change_nothing(act_order: bool) -> None:
    """Columns whose input is always zero are rounded; the others do not notice."""
    w, grid = normal(16, 40, 5), Grid(bits=3, scale_rule="given")
    scales = torch.full((16, 1), 0.03)
    used = torch.ones(40, dtype=torch.bool)
    used[[0, 13, 39]] = False
    hessian = torch.zeros(40, 40, dtype=torch.float64)
    live = correlated(37, 6)
    hessian[used.nonzero(), used.nonzero().T] = live
    ours = GptqFactor(hessian, 0.0, act_order).quantize(w, grid, scales)
    alone = GptqFactor(live, 0.0, act_order).quantize(w[:, used], grid, scales)
    assert torch.equal(ours.codes[:, used], alone.codes)
    assert torch.equal(ours.codes[:, ~used], encode(w, grid, scales).codes[:, ~used])


@pytest.mark.parametrize("plain", [Grid(bits=3), Grid(bits=4, group_size=25)])
def test_a_rotation_is_a_rotated_problem(plain: Grid) -> None:
    """On a rotating grid GPTQ of w for inputs x is that of w Q for inputs x Q, Q written out: its
    outputs are better than rounding's, and the codes are those of the file."""
    grid, w, hessian = replace(plain, rotate=16), normal(24, 90, 1), correlated(90, 2)
    entry = Entry("w", (24, 90), grid)
    inputs = cast(LayerInputs, SimpleNamespace(
        of={"w": SimpleNamespace(products=hessian)}, hessian=lambda _: hessian
    ))  # fmt: skip
    _, ours = methods.gptq(inputs, by_inputs=False)(entry, w, None)
    q = torch.block_diag(*[torch.from_numpy(h / h.shape[0] ** 0.5)
                           for h in map(hadamard, (16, 16, 16, 16, 16, 8, 2))])  # fmt: skip
    factor = GptqFactor(q.T @ hessian @ q, act_order=True)
    expected = factor.quantize((w.double() @ q).float(), plain)
    assert (ours.codes != expected.codes).float().mean() < 0.01  # float32 tips a code
    assert torch.allclose(ours.scales.float(), expected.scales.float(), rtol=1e-3)
    stored = Encoded(entry, ours).decode()
    assert torch.allclose(stored.double(), decode(ours, plain).double() @ q, atol=1e-6)
    error, bound = (trace(found, w, hessian).sum() for found in (stored, snap(w, grid)))
    assert error < 0.7 * bound


def test_one_factor_is_not_shared_by_grids_that_rotate_in_two_ways() -> None:
    w, hessian = normal(24, 64, 1), correlated(64, 2)
    inputs = cast(LayerInputs, SimpleNamespace(
        of={"w": SimpleNamespace(products=hessian)}, hessian=lambda _: hessian
    ))  # fmt: skip
    one = methods.gptq(inputs)
    for size in (None, 16, None, 64):
        entry = Entry("w", (24, 64), Grid(bits=4, rotate=size))
        assert torch.equal(
            one(entry, w, None)[1].codes, methods.gptq(inputs)(entry, w, None)[1].codes
        )


def test_what_is_not_rotated_is_refused() -> None:
    grid = Grid(bits=4, rotate=16)
    with pytest.raises(ValueError, match="rotate = 16: give rotated weights and hessian"):
        GptqFactor(correlated(32, 1)).quantize(normal(4, 32, 1), grid)
    with pytest.raises(ValueError, match="rotate = 16: give rotated weights"):
        weighted_scales(normal(4, 32, 1), grid, torch.ones(32))
    with pytest.raises(ValueError, match="rotate = 16: not of column_scales"):
        awq(normal(4, 32, 1), correlated(32, 1), torch.ones(32), grid)


def test_column_scales_are_a_scaled_problem() -> None:
    """w = c * v has the outputs of v with inputs scaled by c: the same codes."""
    w, hessian = normal(12, 50, 7), correlated(50, 8)
    column_scales = torch.logspace(-1, 1, 50, base=2.0).bfloat16().float()
    row_scales = torch.full((12, 1), 0.02).bfloat16().float()
    by_row = Grid(bits=4, scale_rule="given", scale_dtype="bf16")
    both = Grid(bits=4, scale_rule="given", scale_dtype="bf16", column_scales=True)
    ours = GptqFactor(hessian, 0.0).quantize(
        w, both, torch.cat([row_scales, column_scales[:, None]])
    )
    scaled = GptqFactor(hessian * torch.outer(column_scales, column_scales).double(), 0.0)
    expected = scaled.quantize(w / column_scales, by_row, row_scales)
    assert torch.equal(ours.codes, expected.codes)
    assert torch.allclose(decode(ours, both), decode(expected, by_row) * column_scales)


@pytest.mark.parametrize(
    "grid",
    [Grid(bits=4), Grid("fp8_e4m3"), Grid("fp8_e5m2"), Grid("binary", scale_rule="absmean")],
    ids=lambda grid: grid.label,
)
def test_correlated_inputs_gain_much_and_order_more(grid: Grid) -> None:
    w, hessian = normal(128, 128, 9), correlated(128, 10)
    bound = float(trace(snap(w, grid), w, hessian).sum())
    plain, ordered = (
        float(trace(decode(GptqFactor(hessian, 0.01, a).quantize(w, grid), grid), w, hessian).sum())
        for a in (False, True)
    )
    assert ordered < plain < 0.85 * bound


def test_the_first_column_is_only_rounded() -> None:
    """Errors go on, never back; so the column of largest activations is at its nearest level."""
    w, hessian, grid = normal(16, 30, 11), correlated(30, 12), Grid(bits=3)
    nearest = encode(w, grid)
    for act_order, first in ((False, 0), (True, int(hessian.diagonal().argmax()))):
        ours = GptqFactor(hessian, 0.01, act_order).quantize(w, grid)
        assert torch.equal(ours.codes[:, first], nearest.codes[:, first])


def test_bad_input_is_named() -> None:
    good = correlated(6, 1)
    bad = good.clone()
    bad[1, 1] = math.nan
    for hessian, damping, message in (
        (good[:5], 0.01, r"hessian of shape \(5, 6\)"),
        (bad, 0.01, "NaN or infinity"),
        (good, -1.0, "damping = -1.0: give 0 or more"),
        (good, math.nan, "damping = nan"),
        (correlated(6, 1, tokens=2), 0.0, "damping = 0.0: the hessian is not positive definite"),
        (-good, 0.01, "not positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            GptqFactor(hessian, damping)
    for shape in ((6,), (3, 5), (2, 3, 6)):
        with pytest.raises(ValueError, match="the hessian has 6 columns"):
            GptqFactor(good).quantize(torch.ones(shape), Grid(bits=4))


def prices_for(codes: Codes, per_bit: float) -> BitPrices:
    """A code costs the more the larger it is; two classes of places."""
    rows, columns = codes.codes.shape
    sizes = (torch.arange(256) - 128).abs().float()
    bits = torch.stack([1 + sizes, 0.5 + 3 * sizes])
    classes = (torch.arange(columns) % 2).expand(rows, columns).int()
    return BitPrices(bits, classes, torch.full((rows, 1), per_bit, dtype=torch.float64))


@given(st.integers(0, 1000), st.booleans())
def test_bits_that_cost_nothing_change_nothing(seed: int, act_order: bool) -> None:
    w, hessian, grid = normal(6, 20, seed), correlated(20, seed + 1), Grid(bits=4)
    factor = GptqFactor(hessian, 0.01, act_order)
    free = factor.quantize(w, grid, prices_of=lambda codes, _: prices_for(codes, 0.0))
    assert torch.equal(free.codes, factor.quantize(w, grid).codes)


def test_without_correlation_each_code_is_the_cheaper_of_two() -> None:
    """Errors feed nothing then, so the choices can be made one by one in a loop."""
    w, grid = normal(7, 12, 5), Grid(bits=4)
    weights = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)
    nearest, per_bit = encode(w, grid), 6e-5
    prices = prices_for(nearest, per_bit)
    ours = GptqFactor(torch.diag(weights), 0.0).quantize(w, grid, prices_of=lambda *_: prices)
    changed = 0
    for i in range(7):
        scale = float(nearest.scales[i, 0].float())
        for j in range(12):
            near = int(nearest.codes[i, j])

            def cost(code: int, i: int = i, j: int = j, scale: float = scale) -> float:
                error = weights[j] * (float(w[i, j]) - code * scale) ** 2
                return float(error + per_bit * prices.bits[j % 2, code + 128])

            lower = near - (near > 0) + (near < 0)
            best = min((near, lower), key=cost)
            assert int(ours.codes[i, j]) == best
            changed += best != near
    assert 3 < changed < 60


@given(st.integers(0, 1000), st.floats(1e-7, 1e-3))
def test_error_and_bits_together_are_never_above_those_of_rounding(
    seed: int, per_bit: float
) -> None:
    w, hessian, grid = normal(6, 20, seed), correlated(20, seed + 1), Grid(bits=5)
    nearest = encode(w, grid)
    prices = prices_for(nearest, per_bit)
    ours = GptqFactor(hessian).quantize(w, grid, prices_of=lambda *_: prices)
    found, bound = (
        trace(decode(c, grid), w, hessian) + prices.of_rows(c.codes) for c in (ours, nearest)
    )
    assert (found <= bound * (1 + 1e-9)).all()


def test_own_errors_sum_up_to_the_output_error() -> None:
    """With E fed on as GPTQ feeds it, Tr(E H E^T) is the sum of own errors: their definition."""
    hessian = correlated(16, 9)
    for act_order in (False, True):
        factor = GptqFactor(hessian, 0.0, act_order)
        order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(16)
        lower = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1)).flip(0, 1)
        expected = torch.empty(16, dtype=torch.float64)
        expected[order] = lower.diagonal().square()
        torch.testing.assert_close(factor.own_errors, expected)


def test_errors_of_many_rows_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    error, hessian = normal(50, 12, 0), correlated(12, 1)
    whole = gptq.row_output_errors(error, hessian)
    monkeypatch.setattr(gptq, "BLOCK_ROWS", 7)
    torch.testing.assert_close(gptq.row_output_errors(error, hessian), whole)
    assert len(gptq.row_output_errors(error[:0], hessian)) == 0
