"""The grid: snap is decode of encode, codes stay in range, and the quantile needs no sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quantize.grid import DTYPES, Grid, check_finite, decode, encode, row_quantile, snap

grids = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 40),
    step_rule=st.sampled_from(("amax", "percentile")),
    percentile=st.sampled_from((0.9, 0.99, 0.9999984, 1.0)),
    step_floor=st.sampled_from((0.0, 1 / 127)),
    step_dtype=st.sampled_from(tuple(DTYPES)),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 70)) | st.tuples(st.integers(1, 70))
scales = st.sampled_from((1e-30, 1e-6, 0.02, 1.0, 900.0))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    shape, scale, seed = draw(shapes), draw(scales), draw(st.integers(0, 2**31))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if draw(st.booleans()):
        w[0] = 0.0
    if draw(st.booleans()):
        w[-1] = w.flatten()[0]  # a constant row
    return w


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@given(weights(), grids)
@settings(max_examples=300, deadline=None)
def test_snap_is_decode_of_encode(w: torch.Tensor, grid: Grid) -> None:
    codes, steps = encode(w, grid)
    assert codes.shape == w.shape
    assert codes.dtype == torch.int8
    assert steps.dtype == DTYPES[grid.step_dtype]
    assert int(codes.abs().max()) <= grid.qmax
    snapped = snap(w, grid)
    assert torch.isfinite(snapped).all()
    assert same_bits(snapped, decode(codes, steps, grid))


@given(weights(), grids)
@settings(max_examples=200, deadline=None)
def test_codes_of_a_snapped_weight_are_its_codes(w: torch.Tensor, grid: Grid) -> None:
    """Idempotence with the step held: a weight on the grid rounds to itself."""
    codes, steps = encode(w, grid)
    again = decode(codes, steps, grid)
    rows = again.reshape(1, -1) if w.dim() < 2 else again
    wide = steps.float()
    if grid.group_size is not None:
        wide = wide.repeat_interleave(grid.group_size, 1)[:, : rows.size(1)]
    ratio = torch.where(wide > 0, rows / wide.clamp_min(1e-45), torch.zeros(()))
    assert torch.equal(ratio.round().reshape(w.shape), codes.float())


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_weight_keeps_its_place(bits: int) -> None:
    """Plain arithmetic, independent of the implementation: step = max / qmax, error <= step / 2."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits, step_dtype="fp32")
    step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (snap(w, grid) - w).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    where = w.abs().argmax(1, keepdim=True)
    assert torch.allclose(snap(w, grid).gather(1, where), w.gather(1, where), rtol=1e-6)


def test_negative_zero_is_stored_as_zero() -> None:
    w = torch.tensor([[1.0, -1e-9, -0.0]])
    assert same_bits(snap(w, Grid(4)), torch.tensor([[1.0, 0.0, 0.0]]).mul(snap(w, Grid(4))[0, 0]))


def test_the_step_is_rounded_before_codes_are_computed() -> None:
    """The classic mismatch, codes from the fp32 step and weights from its fp16 one, differs."""
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    grid = Grid(8)
    step32 = w.abs().amax(1, keepdim=True) / 127
    classic = (w / step32).round().clamp(-127, 127) * step32.half().float()
    assert not torch.equal(classic, snap(w, grid))
    step16 = step32.half().float()
    assert torch.equal((w / step16).round().clamp(-127, 127) * step16, snap(w, grid))


def test_rows_too_small_for_their_step_dtype_become_zero() -> None:
    w = torch.full((2, 4), 1e-9)
    codes, steps = encode(w, Grid(8))
    assert not steps.any()
    assert not codes.any()
    assert not snap(w, Grid(8)).any()


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 288, 511, 512, 1000, 1024, 4096, 16_384, 65_536])
def test_quantile_without_sort_equals_torch(n: int) -> None:
    magnitude = torch.randn(8, n, generator=torch.Generator().manual_seed(n)).abs()
    for q in (0.9999984, 1.0, 0.999, 0.9):
        ours, theirs = row_quantile(magnitude, q), torch.quantile(magnitude, q, dim=1)
        assert same_bits(ours, theirs), (n, q)


def test_quantile_does_not_sort_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "quantile", lambda *a, **k: pytest.fail("sorted"))
    row_quantile(torch.rand(4, 65_536), 0.9999984)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_are_named(bad: float) -> None:
    w = torch.ones(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"tensor blocks\.0 holds"):
        check_finite("blocks.0", w, encode(torch.ones(3, 4), Grid(8))[1])


def test_step_overflow_names_tensor_and_row() -> None:
    w = torch.ones(3, 4)
    w[2] = 1e9
    with pytest.raises(ValueError, match=r"tensor w, row 2: its step overflows float16"):
        check_finite("w", w, encode(w, Grid(8))[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 40), ("bits", 1), ("group_size", 0), ("step_rule", "max"), ("percentile", 0.0),
     ("step_floor", -1.0), ("step_dtype", "fp8")],
)  # fmt: skip
def test_impossible_grids_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = "):
        Grid(**{"bits": 8, field: value})  # type: ignore[arg-type]
