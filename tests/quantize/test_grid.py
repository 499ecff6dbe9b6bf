"""The grid: snap is decode of encode, codes stay in range, and the quantile needs no sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qat.quantize.grid import Grid
from qat.quantize.levels import all_levels
from qat.quantize.levels.int import RANGES
from qat.quantize.rounding import (
    DTYPES,
    SCALE_DTYPES,
    Codes,
    check_finite,
    decode,
    encode,
    row_quantile,
    snap,
)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any grid that is allowed."""
    levels = draw(st.sampled_from(tuple(all_levels())))
    table = all_levels()[levels]
    rule = draw(st.sampled_from(table.scale_rules))
    is_float = "power" in table.scale_rules and rule in ("amax", "power", "mse")
    dtype = draw(st.sampled_from(tuple(SCALE_DTYPES if is_float else DTYPES)))
    is_plain = dtype in DTYPES and not table.multiplies
    fields = {
        "levels": levels,
        "bits": draw(st.integers(2, 8)) if levels == "int" else None,
        "range": draw(st.sampled_from(RANGES)) if levels == "int" else "symmetric",
        "group_size": draw(st.none() | st.integers(1, 40)),
        "scale_rule": rule,
        "percentile": draw(st.sampled_from((0.9, 0.99, 0.9999984, 1.0))),
        "sigma": draw(st.sampled_from((2.0, 12.85))),
        "fixed_scale": 0.01 if rule == "fixed" else None,
        "scale_floor": draw(st.sampled_from((0.0, 1 / 127))) if is_plain else 0.0,
        "scale_dtype": dtype,
        "code_scale_dtype": draw(st.none() | st.just("fp32")) if is_plain else None,
        "refit": levels == "ternary" and draw(st.booleans()),
        "column_scales": rule == "given" and draw(st.booleans()),
        "rotate": draw(st.none() | st.sampled_from((2, 16))) if not table.multiplies else None,
    }
    if fields["group_size"] is None:
        fields["per_tensor"] = draw(st.booleans())
    try:
        return Grid(**fields)
    except ValueError:
        assume(False)
        raise


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


def given_scales(w: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """Scales of every size for a grid that has to be handed some."""
    if grid.scale_rule != "given":
        return None
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(grid.scales_shape(tuple(w.shape)), generator=generator).exp()
    size = float(w.abs().max()) / 20 or 1.0
    return spread * (math.sqrt(size) if grid.column_scales else size)


@given(weights(), grids())
def test_snap_is_decode_of_encode(w: torch.Tensor, grid: Grid) -> None:
    scales = given_scales(w, grid)
    coded = encode(w, grid, scales)
    assert coded.codes.shape == w.shape
    assert coded.codes.dtype == torch.int8
    assert coded.scales.dtype == SCALE_DTYPES[grid.scale_dtype]
    assert tuple(coded.scales.shape) == grid.scales_shape(tuple(w.shape))
    has_zeros = grid.range == "asymmetric" or grid.table.has_minimum
    assert (coded.zeros is not None) == has_zeros
    assert (coded.tensor_scale is not None) == grid.has_tensor_scale
    low, high = grid.table.limits
    numbers = grid.table.from_codes(coded.codes)
    assert low <= float(numbers.min()) <= float(numbers.max()) <= high
    lowest, highest = grid.table.codes
    assert lowest <= int(coded.codes.min()) <= int(coded.codes.max()) <= highest
    snapped = snap(w, grid, scales)
    assert torch.isfinite(snapped).all()
    assert same_bits(snapped, decode(coded, grid))
    if not grid.table.keeps_negative_zero:
        assert not (torch.signbit(snapped) & (snapped == 0)).any()


@pytest.mark.parametrize("levels", ["fp8_e5m2", "fp8_e4m3", "e2m1"])
@pytest.mark.parametrize("tiny", [2.9e-31, 1e-35, 1e-38, 1e-42])
def test_zeros_beside_tiny_weights_stay_zeros(levels: str, tiny: float) -> None:
    """Where the scale of the tensor is so small that its reciprocal overflows."""
    w = torch.tensor([[0.0, 0.0], [0.0, -tiny]])
    snapped = snap(w, Grid(levels=levels, bits=None, scale_dtype="e4m3"))
    assert torch.isfinite(snapped).all()
    assert (snapped[w == 0] == 0).all()


@given(weights(), grids())
def test_a_snapped_weight_stays_with_the_scale_held(w: torch.Tensor, grid: Grid) -> None:
    """decode(encode(snap(w), scale), scale) == snap(w), where coding and decoding share a scale."""
    assume(grid.code_scale_dtype is None and not grid.refit and grid.range != "asymmetric")
    assume(not grid.scale_floor and not grid.table.has_minimum and not grid.has_tensor_scale)
    first = encode(w, grid, given_scales(w, grid))
    again = encode(decode(first, grid), grid, first.scales.float())
    held, snapped = decode(Codes(again.codes, first.scales), grid), decode(first, grid)
    if grid.rotate is None:
        assert torch.equal(held, snapped)
    else:  # up to what rotating there and back rounds
        assert (held - snapped).abs().max() <= 1e-5 * snapped.abs().max()


@given(weights(), st.integers(2, 8), st.none() | st.integers(1, 40))
def test_asymmetric_grids_hold_zero(w: torch.Tensor, bits: int, group_size: int | None) -> None:
    grid = Grid(bits=bits, range="asymmetric", group_size=group_size)
    w = w.clone()
    w.flatten()[0] = 0.0
    assert snap(w, grid).flatten()[0] == 0.0


def test_column_scales_multiply_row_scales() -> None:
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    given = torch.rand(12, 1, generator=torch.Generator().manual_seed(1)).div(50).add(0.1)
    rows, columns = given.bfloat16().split((7, 5))  # rounded before codes are computed
    grid = Grid(bits=8, scale_rule="given", scale_dtype="bf16", column_scales=True)
    coded = encode(w, grid, given)
    expected = (w / columns.float().T / rows.float()).round().clamp(-127, 127)
    assert torch.equal(coded.codes.float(), expected)
    assert torch.allclose(decode(coded, grid), expected * rows.float() * columns.float().T)
    assert torch.equal(coded.scales, torch.cat([rows, columns]))


def test_given_scales_have_to_be_given() -> None:
    with pytest.raises(ValueError, match="handed in"):
        snap(torch.ones(2, 2), Grid(bits=4, scale_rule="given"))


def test_torchaos_symmetric_mapping_is_the_full_range() -> None:
    """amax / 31.5 for 6 bits, codes -32 ... 31, against torchao's own fake quantizer."""
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = torch.randn(32, 96, generator=torch.Generator().manual_seed(3))
    for bits in (4, 6, 8):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = torchao.choose_qparams_affine(
            w, torchao.MappingType.SYMMETRIC, (1, 96), torch.int8, low, high,
            scale_dtype=torch.float32, zero_point_dtype=torch.int32,
        )  # fmt: skip
        codes = torchao.quantize_affine(w, (1, 96), scale, zero, torch.int8, low, high)
        ours = encode(w, Grid(bits=bits, range="full", scale_dtype="fp32"))
        assert torch.equal(ours.scales.flatten(), scale.flatten())
        assert (ours.codes != codes).float().mean() < 0.002  # they multiply by 1/scale


@pytest.mark.parametrize("group_size", [None, 32])
def test_torchaos_fake_quantizer_gives_the_same_weights(group_size: int | None) -> None:
    """IntxFakeQuantizer, int8 symmetric: amax / 127.5, codes -128 ... 127."""
    qat = pytest.importorskip("torchao.quantization.qat")
    w = torch.randn(32, 96, generator=torch.Generator().manual_seed(4))
    granularity = {"granularity": "per_channel"} if group_size is None else {"group_size": 32}
    config = qat.IntxFakeQuantizeConfig(torch.int8, is_symmetric=True, **granularity)
    theirs = qat.fake_quantizer.IntxFakeQuantizer(config)(w)
    ours = snap(w, Grid(bits=8, range="full", scale_dtype="fp32", group_size=group_size))
    groups = w.view(32, -1, group_size or 96)
    # The largest weight of a group is a tie, 127.5: they multiply by 1/scale and may miss it.
    is_largest = (groups.abs() == groups.abs().amax(-1, keepdim=True)).view_as(w)
    assert torch.allclose(ours[~is_largest], theirs[~is_largest], rtol=0, atol=1e-6)
    assert (ours - theirs).abs().max() <= 1.01 * w.abs().max() / 127.5


def test_ternary_is_absmean_and_refit_undoes_its_shrinkage() -> None:
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    plain = encode(w, Grid("ternary", scale_rule="absmean", scale_dtype="fp32"))
    scale = w.abs().mean(1, keepdim=True)
    assert torch.equal(plain.codes.float(), (w / scale).round().clamp(-1, 1))
    refit = Grid("ternary", scale_rule="absmean", scale_dtype="fp32", refit=True)
    shrunk = snap(w, Grid("ternary", scale_rule="absmean", scale_dtype="fp32"))
    assert torch.allclose(snap(w, refit).abs().mean(1), w.abs().mean(1), rtol=1e-5)
    assert (shrunk.abs().mean(1) < 0.9 * w.abs().mean(1)).all()


def test_binary_keeps_signs_and_mean_magnitude() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    w[3] = 0.0
    snapped = snap(w, Grid("binary", scale_rule="absmean", scale_dtype="fp32"))
    assert torch.equal(snapped.sign(), torch.where(w == 0, 0.0, torch.where(w < 0, -1.0, 1.0)))
    assert torch.allclose(snapped.abs()[:, 0], w.abs().mean(1))


def test_fp8_is_the_formats_own_rounding() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    scale = w.abs().amax(1, keepdim=True) / 448.0
    expected = (w / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(snap(w, Grid("fp8_e4m3", scale_dtype="fp32")), expected)


def test_sdclip_scale_is_its_share_of_sigma() -> None:
    """FIELD: int6 at k = 12.85 has scale = 0.4145 sigma and 3.33 bits per weight of entropy."""
    w = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(1))
    coded = encode(w, Grid(bits=6, scale_rule="sigma", scale_dtype="fp32"))
    assert torch.allclose(coded.scales.flatten(), 0.4145 * w.std(1), rtol=1e-3)
    counts = torch.bincount(coded.codes.flatten().int() + 31).double()
    share = counts[counts > 0] / counts.sum()
    assert -(share * share.log2()).sum().item() == pytest.approx(3.33, abs=0.02)


def test_mse_clip_is_never_worse_than_amax() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) ** 3

    def error(rule: str) -> torch.Tensor:
        return (snap(w, Grid(bits=4, scale_rule=rule)) - w).square().sum(1)

    assert (error("mse") <= error("amax")).all()
    assert error("mse").sum() < 0.95 * error("amax").sum()


def test_int8_golf_is_the_challenges_file() -> None:
    """An independent sort-based statement of the challenge's export rule."""
    grid = Grid(bits=8, scale_rule="percentile", scale_floor=1 / 127, code_scale_dtype="fp32")
    for spread in (0.05, 0.9, 3.0):
        w = spread * torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
        clip = torch.quantile(w.abs(), 0.9999984, dim=1)
        scale = (clip / 127.0).clamp_min(1.0 / 127.0)
        clamped = torch.maximum(torch.minimum(w, clip[:, None]), -clip[:, None])
        codes = (clamped / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        ours = encode(w, grid)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.scales.flatten(), scale.half())
        if spread == 0.05:  # the floor binds: few of the 255 levels are used
            assert int(codes.abs().max()) < 40


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_weight_keeps_its_place(bits: int) -> None:
    """Plain arithmetic, not the implementation's: scale = max / qmax, error <= scale / 2."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits=bits, scale_dtype="fp32")
    scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (snap(w, grid) - w).abs()
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    where = w.abs().argmax(1, keepdim=True)
    assert torch.allclose(snap(w, grid).gather(1, where), w.gather(1, where), rtol=1e-6)


def test_negative_zero_is_stored_as_zero() -> None:
    w = torch.tensor([[1.0, -1e-9, -0.0]])
    assert same_bits(
        snap(w, Grid(bits=4)), torch.tensor([[1.0, 0.0, 0.0]]).mul(snap(w, Grid(bits=4))[0, 0])
    )


def test_the_scale_is_rounded_before_codes_are_computed() -> None:
    """The classic mismatch, codes from the fp32 scale and weights from its fp16 one, differs."""
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits=8)
    scale32 = w.abs().amax(1, keepdim=True) / 127
    classic = (w / scale32).round().clamp(-127, 127) * scale32.half().float()
    assert not torch.equal(classic, snap(w, grid))
    scale16 = scale32.half().float()
    assert torch.equal((w / scale16).round().clamp(-127, 127) * scale16, snap(w, grid))


def test_rows_too_small_for_their_scale_dtype_become_zero() -> None:
    w = torch.full((2, 4), 1e-9)
    codes, scales, *_ = encode(w, Grid(bits=8))
    assert not scales.any()
    assert not codes.any()
    assert not snap(w, Grid(bits=8)).any()


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 288, 511, 512, 1000, 1024, 4096, 16_384, 65_536])
def test_quantile_without_sort_equals_torch(n: int) -> None:
    magnitude = torch.randn(8, n, generator=torch.Generator().manual_seed(n)).abs()
    for q in (0.9999984, 1.0, 0.999, 0.9):
        ours, theirs = row_quantile(magnitude, q), torch.quantile(magnitude, q, dim=1)
        assert same_bits(ours, theirs), (n, q)


def test_quantile_does_not_sort_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quantile", "sort"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("sorted"))
    row_quantile(torch.rand(4, 65_536), 0.9999984)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_are_named(bad: float) -> None:
    w = torch.ones(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"tensor blocks\.0 holds"):
        check_finite("blocks.0", w, encode(torch.ones(3, 4), Grid(bits=8)).scales)


def test_scale_overflow_names_tensor_and_row() -> None:
    w = torch.ones(3, 4)
    w[2] = 1e9
    with pytest.raises(ValueError, match=r"tensor w, row 2: its scale overflows float16"):
        check_finite("w", w, encode(w, Grid(bits=8)).scales)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 40), ("bits", 1), ("bits", None), ("group_size", 0), ("scale_rule", "max"),
        ("percentile", 0.0), ("scale_floor", -1.0), ("scale_dtype", "fp8"), ("levels", "int9"),
        ("range", "lopsided"), ("sigma", 0.0), ("fixed_scale", 0.1), ("refit", True),
        ("code_scale_dtype", "fp64"), ("scale_floor", math.nan),
    ],
)  # fmt: skip
def test_impossible_grids_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = "):
        Grid(**{"bits": 8, field: value})  # type: ignore[arg-type]


def test_impossible_combinations_are_refused() -> None:
    for fields in (
        {"levels": "ternary", "bits": 3},
        {"levels": "fp8_e4m3", "range": "full"},
        {"bits": 4, "range": "asymmetric", "scale_rule": "mse"},
        {"bits": 4, "group_size": 8, "per_tensor": True},
        {"bits": 4, "scale_rule": "fixed"},
        {"levels": "binary", "scale_rule": "learned"},
    ):
        with pytest.raises(ValueError, match=" = "):
            Grid(**fields)
