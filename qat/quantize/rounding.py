"""Rounding: the only place where weights meet their grid.

``encode`` turns weights into codes, scales and zero points, ``decode`` turns them back, and
``snap`` is decode of encode: literally, so that the weight a model trains with is the weight its
artifact stores, bit for bit.

A scale that is zero after rounding (an all-zero row, or one too small for fp16) gives zero codes
and zero weights. What is not finite is an error of ``check_finite``, which names the tensor; the
hot path does not look, since looking would stall a GPU.

The bits are the same on every device, whoever snaps or encodes, for scales that need no sums: each
operation is one that rounds alike everywhere. So there is division by the scale, not multiplication
by its reciprocal, which differs in the last bit; and products are rounded before they are added to.
CUDA hides both: a tensor divided by a Python number is multiplied by its reciprocal there, and
``torch.lerp`` (or ``torch.mean``) is one kernel that a compiler fuses as the device likes. Hence
``quotient`` and ``between``. A format that another program defines by a product with the reciprocal
gets that: ``Coding.inverse``.

The percentile clip needs no sort: the linear-interpolated quantile of a row shorter than 1 / (1 -
q) lies between its two largest entries, so those two are all that has to be found; only longer rows
are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.levels import nearest_of_format, nearest_of_mantissa

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of storage
SCALE_DTYPES = DTYPES | {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
LARGEST = torch.finfo(torch.float32).max
LARGEST_E4M3, LEAST_NORMAL_E4M3 = 448.0, 2.0**-6
LEAST_E8M0 = 2.0**-127
ROTATED_AT_ONCE = 1 << 20  # weights, so that a reader needs no second copy of a large tensor


@torch.compiler.assume_constant_result
def _rank(n: int, q: float) -> tuple[int, float]:
    """Position of the quantile among n sorted entries: the entry below it, the share of the next.

    In float32, as in ``torch.quantile``.
    """
    rank = torch.tensor(q, dtype=torch.float32) * (n - 1)
    below = int(rank.floor())
    return below, float(rank - below)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once on every device."""
    return x / x.new_full((), divisor)  # on x's device: one of a CPU counts as a Python number


def between(low: Tensor, high: Tensor, share: float) -> Tensor:
    """As ``torch.lerp`` with a fused multiply-add, float32, on every device.

    The product of two float32 numbers is exact in float64, so nothing hangs on what is fused.
    """
    reach = (high - low).double()
    found = low + reach * share if share < 0.5 else high - reach * (1.0 - share)
    return found.float()


def is_among_top_two(n: int, q: float) -> bool:
    return _rank(n, q)[0] >= n - 2


def top_two(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """The largest two of each row (of a row of one entry: that one twice); (..., n) -> (...)."""
    if magnitude.size(-1) == 1:
        return magnitude[..., 0], magnitude[..., 0]
    if not torch.compiler.is_compiling():
        first, second = magnitude.topk(2, dim=-1).values.unbind(-1)
        return first, second
    # The same two by maxima alone, which a compiler fuses into one pass (topk it does not).
    first = magnitude.amax(-1)
    is_first = magnitude == first[..., None]
    runner_up = torch.where(is_first, -1.0, magnitude).amax(-1)
    return first, torch.where(is_first.float().sum(-1) > 1, first, runner_up)


def between_top_two(first: Tensor, second: Tensor, n: int, q: float) -> Tensor:
    """The quantile of rows of n entries from their largest two."""
    below, share = _rank(n, q)
    return first if below >= n - 1 else between(second, first, share)


def row_quantile(magnitude: Tensor, q: float) -> Tensor:
    """``torch.quantile(magnitude, q, dim=-1)``, bit for bit; (..., n) -> (...)."""
    n = magnitude.size(-1)
    if is_among_top_two(n, q):
        return between_top_two(*top_two(magnitude), n, q)
    below, share = _rank(n, q)
    ordered = torch.sort(magnitude, dim=-1).values
    return between(ordered[..., below], ordered[..., below + 1], share)


MSE_SHARES = tuple(1.0 - 0.04 * k for k in range(16))  # of max|w|, tried by the mse rule


class Codes(NamedTuple):
    """int8 codes of the weight's shape; scales, and zero points or minima, (rows, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None  # (1,), of scales in its units

    def cpu(self) -> Codes:
        return Codes(*(None if t is None else t.cpu() for t in self))  # type: ignore[arg-type]

    @property
    def decoding_scales(self) -> Tensor:
        """Float32 (rows, groups)."""
        scales = self.scales.float()
        return scales if self.tensor_scale is None else scales * self.tensor_scale


def group_views(w: Tensor, grid: Grid) -> list[Tensor]:
    """``w`` as (rows, groups, columns) views: whole groups, and the shorter last one if any."""
    rows = w.reshape(1, -1) if grid.per_tensor or w.dim() < 2 else w.flatten(1)
    size = grid.group_size or rows.size(1)
    whole = rows.size(1) // size * size
    views = [rows[:, :whole].unflatten(1, (-1, size))] if whole else []
    return views + ([rows[:, None, whole:]] if whole < rows.size(1) else [])


def join_groups(views: list[Tensor], shape: torch.Size) -> Tensor:
    """The inverse of ``group_views``."""
    flat = [view.flatten(1) for view in views]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).view(shape)


def split_scales(scales: Tensor, views: list[Tensor]) -> list[Tensor]:
    """(rows, groups) per view, ready to broadcast: (rows, groups of the view, 1)."""
    return [s[..., None] for s in scales.split([view.size(1) for view in views], dim=1)]


def by_group(
    function: Callable[..., tuple[Tensor, ...]],
    w: Tensor,
    scales: Tensor,
    grid: Grid,
    *others: Tensor,
) -> list[Tensor]:
    """What ``function`` makes of every view of ``w``, its scales and the same views of ``others``,
    in ``w``'s shape."""
    views = group_views(w, grid)
    given = [views, split_scales(scales, views), *(group_views(other, grid) for other in others)]
    made = [function(*parts) for parts in zip(*given, strict=True)]
    return [join_groups(list(parts), w.shape) for parts in zip(*made, strict=True)]


def rotate_(w: Tensor, size: int) -> Tensor:
    """``rotated`` in place, of a contiguous tensor, in blocks of ``size``; ``w``."""
    rows = w.flatten(1) if w.dim() > 1 else w.view(1, -1)
    start = 0
    while (left := rows.size(1) - start) > 1:
        block = min(size, 1 << left.bit_length() - 1)
        width = min(left // block * block, ROTATED_AT_ONCE)
        columns = rows[:, start : start + width]
        for part in columns.split(max(ROTATED_AT_ONCE // width, 1)):
            _multiply_by_hadamard_(part.unflatten(1, (-1, block)))
        start += width
    return w


def _multiply_by_hadamard_(blocks: Tensor) -> None:
    """In place, (rows, blocks, columns of a block)."""
    size = blocks.size(2)
    x = blocks.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)  # long inner loops
    half = 1
    while half < size:
        first, second = x.unflatten(0, (-1, 2, half)).unbind(1)
        both = first + second
        torch.sub(first, second, out=second)
        first.copy_(both)
        half *= 2
    blocks.copy_(x.mul_(size**-0.5).add_(0.0).permute(1, 2, 0))  # -0 becomes +0


def rotated(w: Tensor, grid: Grid) -> Tensor:
    """``w`` as a grid that rotates sees it, and back: its own inverse, up to float accuracy. A new
    tensor, without autograd; ``w`` itself if the grid does not rotate.

    Each row is multiplied by Hadamard matrices of ``grid.rotate`` columns and, for what is left at
    its end, of the largest powers of two that fit. The bits are the same on every device: sums and
    differences of two numbers in a fixed order, then one product (exact for powers of four). A
    matrix product would leave the order to the device.
    """
    if grid.rotate is None:
        return w
    return rotate_(w.detach().clone(memory_format=torch.contiguous_format), grid.rotate)


def round_to_levels(x: Tensor, grid: Grid) -> Tensor:
    """Weights in units of their scale -> the nearest levels, float32."""
    return grid.table.nearest(x)


def in_scale_units(view: Tensor, scale: Tensor) -> Tensor:
    """w / scale, and 0 where the scale is 0."""
    return view / torch.where(scale != 0, scale, torch.inf)


def _clip_to_scale(clip: Tensor, grid: Grid) -> Tensor:
    low, high = grid.table.limits
    return quotient(clip, (high - low) / 2).clamp_min(grid.scale_floor)


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above x >= 0, float32; 0 of 0 and of subnormals."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def power_above(x: Tensor) -> Tensor:
    """The least power of two that is not below x >= 0, and not below that of the byte 0."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0)
    return torch.where(x <= LEAST_E8M0, LEAST_E8M0, (exponent << 23).view(torch.float32))


def stored_scales(scales: Tensor, grid: Grid) -> Tensor:
    """Scales as a file stores them: float32 numbers that the storage dtype holds. Not of scales in
    units of a tensor's."""
    if grid.scale_dtype == "e8m0":
        return power_above(scales)
    return nearest_float(scales, grid.scale_dtype)


def nearest_float(x: Tensor, dtype: str) -> Tensor:
    """The nearest number that fp32, bf16 or fp16 holds, of two the even one; float32.

    Compiled by arithmetic, because a compiler drops the detour through another dtype.
    """
    if not torch.compiler.is_compiling() or dtype == "fp32":
        return x.to(DTYPES[dtype]).float()
    if dtype == "bf16":  # its exponents are those of float32
        return nearest_of_mantissa(x, 7)
    nearest = nearest_of_format(x, 10, 2.0**-14)
    return torch.where(nearest.abs() > 65504.0, nearest * torch.inf, nearest)


def nearest_e4m3(x: Tensor) -> Tensor:
    """As ``x.to(float8_e4m3fn).float()`` of normal numbers, and many times faster on a CPU."""
    return nearest_of_mantissa(x, 3)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, rounded once on every device; 0 of 0, and the largest number where it overflows."""
    return torch.where(x != 0, torch.ones_like(x) / x, 0.0).clamp(-LARGEST, LARGEST)


class Coding(NamedTuple):
    """How one view is coded, each (rows, groups)."""

    stored_scale: Tensor  # float32 numbers that its storage dtype holds
    code_scale: Tensor  # float32, what codes are computed with
    zero: Tensor | None = None  # added to codes; of grids with a minimum: taken from weights
    clip: Tensor | None = None  # where it must bind by itself
    inverse: Tensor | None = None  # weights are multiplied by it, not divided by code_scale
    stored_zero: Tensor | None = None  # as codes.zeros, where it is not the zero that codes
    tensor_scale: Tensor | None = None

    @property
    def decoding_scale(self) -> Tensor:
        """Float32."""
        scale = self.stored_scale
        return scale if self.tensor_scale is None else scale * self.tensor_scale

    @property
    def decoding_zero(self) -> Tensor | None:
        return self.zero if self.stored_zero is None else self.stored_zero

    def to_apply(self, grid: Grid) -> Coding:
        """What ``encode_view`` and ``decode_view`` need of it, in as few numbers as do."""
        scale = self.decoding_scale
        is_used = self.inverse is None or not grid.table.has_zero
        code_scale = self.code_scale if is_used else scale
        return self._replace(stored_scale=scale, code_scale=code_scale, tensor_scale=None)


def _coding(
    scale: Tensor, grid: Grid, clip: Tensor | None = None, tensor_scale: Tensor | None = None
) -> Coding:
    if tensor_scale is not None:
        # In this order, and by the reciprocal: the bits of NVFP4 as torchao makes it.
        units = in_scale_units(scale, tensor_scale).clamp(LEAST_NORMAL_E4M3, LARGEST_E4M3)
        stored = nearest_e4m3(units)
        inverse = (_reciprocal(tensor_scale) / stored).clamp_max(LARGEST)  # by which 0 stays 0
        tensor_scale = tensor_scale.expand_as(scale)
        return Coding(stored, stored * tensor_scale, inverse=inverse, tensor_scale=tensor_scale)
    stored = stored_scales(scale, grid)
    if grid.table.multiplies:
        return Coding(stored, scale, inverse=_reciprocal(scale))
    if grid.code_scale_dtype is None:
        return Coding(stored, stored, clip=clip)
    return Coding(stored, nearest_float(scale, grid.code_scale_dtype), clip=clip)


def order_statistics(view: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """What the scale of each group is made from, (rows, groups) each; () if its rule needs sums.

    Maxima and minima are exact in whatever order they are found, so a fused pass may find them.
    """
    if grid.scale_rule not in ("amax", "percentile", "power"):
        return ()
    if grid.range == "asymmetric" or grid.table.has_minimum or grid.table.scale_has_sign:
        return view.amin(-1), view.amax(-1)
    if grid.scale_rule in ("amax", "power"):
        return (view.abs().amax(-1),)
    if is_among_top_two(view.size(-1), grid.percentile):
        return top_two(view.abs())
    return ()


def signed_maximum(low: Tensor, high: Tensor, groups_at: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight of largest magnitude of each group, of equal ones the first.

    ``low`` and ``high`` are its ends; ``groups_at`` gives the weights (n, columns) of the groups at
    n places, and is asked only where both ends are as far from 0.
    """
    found = torch.where(high > -low, high, low).flatten()
    places = ((high == -low) & (high > 0)).flatten().nonzero().flatten()
    if len(places):
        tied = groups_at(places)
        first = tied.abs().argmax(-1, keepdim=True)  # which is the first of equal ones
        found[places] = tied.gather(-1, first)[:, 0]
    return found.view_as(low)


def tensor_scale_of(amax: Tensor, grid: Grid) -> Tensor:
    """The scale of a tensor from max|w| of all of it, where e4m3 scales are in its units."""
    return quotient(amax, LARGEST_E4M3 * grid.table.limits[1])


def coding_from(
    found: tuple[Tensor, ...], grid: Grid, columns: int, tensor_scale: Tensor | None = None
) -> Coding:
    """The scale of groups of ``columns`` weights from their order statistics.

    Where scales have a sign, from their ``signed_maximum``; where they are in units of a tensor's,
    from that too.
    """
    if grid.table.has_minimum:
        low, high = grid.table.limits
        least, most = (end + 0.0 for end in found)  # -0 becomes +0: a maximum of both is either
        coding = _coding(quotient(most - least, high - low), grid)
        return coding._replace(zero=least, stored_zero=nearest_float(least, grid.scale_dtype))
    if grid.table.scale_has_sign:
        return _coding(quotient(found[0] + 0.0, grid.table.limits[0]), grid)  # likewise
    if grid.scale_rule == "power":
        exponent = math.frexp(grid.table.limits[1])[1] - 1
        return _coding(quotient(power_below(found[0]), 2.0**exponent), grid)
    if grid.range == "asymmetric":
        low, high = grid.table.limits
        lowest, highest = found[0].clamp_max(0.0), found[1].clamp_min(0.0)
        scale = quotient(highest - lowest, high - low).clamp_min(grid.scale_floor)
        coding = _coding(scale, grid)
        zero = (low - in_scale_units(lowest, coding.stored_scale)).round().clamp(low, high)
        return coding._replace(zero=zero)
    if grid.scale_rule == "amax":
        return _coding(_clip_to_scale(found[0], grid), grid, tensor_scale=tensor_scale)
    first, second = found
    return _clipped_coding(between_top_two(first, second, columns, grid.percentile), grid)


def _clipped_coding(clip: Tensor, grid: Grid) -> Coding:
    # Where a floor binds, codes do not reach their limits, and the clip has to do the clipping.
    binds = grid.scale_floor > 0.0 and grid.scale_rule in ("percentile", "sigma")
    return _coding(_clip_to_scale(clip, grid), grid, clip if binds else None)


def _find_coding(view: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Coding:
    if found := order_statistics(view, grid):
        if grid.table.scale_has_sign:
            low, high = found
            found = (signed_maximum(low, high, lambda places: view.flatten(0, -2)[places]),)
        return coding_from(found, grid, view.size(-1), tensor_scale)
    if grid.scale_rule == "given":
        raise ValueError("scale_rule = given: the scales have to be handed in")
    if grid.scale_rule == "fixed":
        return _coding(torch.full_like(view[..., 0], grid.fixed_scale or 0.0), grid)
    if grid.scale_rule == "absmean":
        return _coding(view.abs().mean(-1).clamp_min(grid.scale_floor), grid)
    if grid.scale_rule == "percentile":
        return _clipped_coding(row_quantile(view.abs(), grid.percentile), grid)
    if grid.scale_rule == "sigma":
        return _clipped_coding(grid.sigma * view.std(-1, correction=0), grid)
    return _coding(_clip_to_scale(_least_square_clip(view, grid), grid), grid)


def _least_square_clip(view: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    amax = view.abs().amax(-1)
    best_clip, least = amax, torch.full_like(amax, torch.inf)
    for share in MSE_SHARES:
        clip = amax * share
        scale = stored_scales(_clip_to_scale(clip, grid), grid)[..., None]
        square = round_to_levels(in_scale_units(view, scale), grid).mul_(scale).sub_(view).square_()
        error = (square if importance is None else square.mul_(importance)).sum(-1)
        best_clip = torch.where(error < least, clip, best_clip)
        least = torch.minimum(error, least)
    return best_clip


def weighted_scales(w: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """Scales of the mse rule where a squared error in column j counts ``importance[j]`` times.

    ``importance`` (columns,) is the diagonal of the hessian: the mean square of each input. Returns
    scales (rows, groups) to hand to ``encode``, float32. ValueError for a grid without an mse rule,
    or one that rotates: both are then of what is rotated.
    """
    if grid.rotate is not None:
        raise ValueError(f"rotate = {grid.rotate}: give rotated weights and the grid without it")
    rule = replace(grid, scale_rule="mse", fixed_scale=None)
    views = zip(group_views(w, rule), group_views(importance.expand_as(w), rule), strict=True)
    clips = [_least_square_clip(view, rule, counts) for view, counts in views]
    return torch.cat([_clip_to_scale(clip, rule) for clip in clips], dim=1)


def encode_view(view: Tensor, grid: Grid, coding: Coding) -> Tensor:
    """Levels of one view, with zero points: codes of it, as float32 numbers."""
    if coding.clip is not None:
        view = view.clamp(-coding.clip[..., None], coding.clip[..., None])
    if coding.zero is not None and grid.table.has_minimum:
        view = view - coding.zero[..., None]
    if coding.inverse is None:
        x = in_scale_units(view, coding.code_scale[..., None])
    else:
        x = view * coding.inverse[..., None]
    if coding.zero is not None and not grid.table.has_minimum:
        return x.round().add_(coding.zero[..., None]).clamp_(*grid.table.limits)
    level = round_to_levels(x, grid)
    return level if grid.table.has_zero else level * (coding.code_scale > 0)[..., None]


def decode_view(code: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Weights of one view from what ``encode_view`` makes of it; ``code`` is overwritten."""
    if zero is not None and grid.table.has_minimum:
        return code.mul_(scale[..., None]).add_(zero[..., None])
    if zero is not None:
        code.sub_(zero[..., None])
    code.mul_(scale[..., None])
    # -0 becomes +0: equal weights are equal bits
    return code if grid.table.keeps_negative_zero else code.add_(0.0)


def _refitted(code: Tensor, coding: Coding, dtype: str) -> Tensor:
    """The stored scale that undoes the shrinkage of mean|w|."""
    mean = quotient(code.abs().sum(-1), code.size(-1))  # of whole numbers: exact in any order
    scale = torch.where(mean > 0, coding.code_scale / mean, coding.code_scale)
    return nearest_float(scale, dtype)


def _rows(w: Tensor) -> int:
    return w.size(0) if w.dim() > 1 else 1


def products_in_scale_units(w: Tensor, scales: Tensor) -> Tensor:
    """w / (row scale * column scale), (rows, columns); ``scales`` (rows + columns, 1)."""
    rows = _rows(w)
    by_column = in_scale_units(w.reshape(rows, -1), scales[rows:].float().T)
    return in_scale_units(by_column, scales[:rows].float())


def _product_scales(w: Tensor, grid: Grid) -> Tensor:
    """Per row by the grid's rule, 1 for every column."""
    matrix = w.reshape(_rows(w), -1)
    of_rows = encode(matrix, replace(grid, column_scales=False)).scales.float()
    return torch.cat([of_rows, torch.ones_like(matrix[:1]).T])


def encode(w: Tensor, grid: Grid, scales: Tensor | None = None) -> Codes:
    """Float32 weights -> codes and scales (and zero points).

    ``scales``, of the grid's ``scales_shape``, are learned or given ones; without them the grid's
    own rule finds them. ValueError if a grid of given scales is without. Of a grid that rotates
    codes and scales are those of rotated weights, ``scales`` too.
    """
    if grid.rotate is not None:
        return encode(rotated(w, grid), grid.unrotated, scales)
    if grid.column_scales:
        if scales is None:
            scales = _product_scales(w, grid)
        rows, by_row = _rows(w), replace(grid, column_scales=False)
        columns = stored_scales(scales[rows:], grid)
        scaled = in_scale_units(w.reshape(rows, len(columns)), columns.T).view_as(w)
        inner = encode(scaled, by_row, scales[:rows])
        columns = columns.to(inner.scales.dtype)
        return inner._replace(scales=torch.cat([inner.scales, columns]))
    views = group_views(w, grid)
    codings, tensor_scale = _codings(w, views, grid, scales)
    pairs = list(zip(views, codings, strict=True))
    coded = [encode_view(view, grid, coding) for view, coding in pairs]
    stored = [coding.stored_scale for coding in codings]
    if grid.refit:
        parts = zip(coded, codings, strict=True)
        stored = [_refitted(code, coding, grid.scale_dtype) for code, coding in parts]
    codes = join_groups(coded, w.shape)
    zeros = [_stored_zero(coding, grid) for coding in codings if coding.zero is not None]
    return Codes(
        grid.table.to_codes(codes),
        torch.cat(stored, dim=1).to(SCALE_DTYPES[grid.scale_dtype]),
        torch.cat(zeros, dim=1) if zeros else None,
        None if tensor_scale is None else tensor_scale.reshape(1),
    )


def _codings(
    w: Tensor, views: list[Tensor], grid: Grid, scales: Tensor | None
) -> tuple[list[Coding], Tensor | None]:
    """How each view is coded, and the scale of the tensor, if its scales are in units of one."""
    tensor_scale = None
    if grid.has_tensor_scale:
        if scales is not None:
            tensor_scale = quotient(scales.amax(), LARGEST_E4M3)
        else:
            tensor_scale = tensor_scale_of(w.abs().amax(), grid)
    if scales is None:
        return [_find_coding(view, grid, tensor_scale) for view in views], tensor_scale
    given = [scale[..., 0] for scale in split_scales(scales, views)]
    if not grid.table.scale_has_sign:
        given = [scale.clamp_min(grid.scale_floor) for scale in given]
    return [_coding(scale, grid, tensor_scale=tensor_scale) for scale in given], tensor_scale


def scales_of(w: Tensor, grid: Grid, scales: Tensor | None = None) -> Tensor:
    """The scales that ``encode`` would decode with, float32 (rows, groups), without the codes. Not
    of a grid that rotates, has scales of columns or refits."""
    codings, _ = _codings(w, group_views(w, grid), grid, scales)
    return torch.cat([coding.decoding_scale for coding in codings], dim=1)


def _stored_zero(coding: Coding, grid: Grid) -> Tensor:
    assert coding.zero is not None
    if coding.stored_zero is None:
        return coding.zero.to(torch.int8)
    return coding.stored_zero.to(DTYPES[grid.scale_dtype])


def decode(coded: Codes, grid: Grid) -> Tensor:
    """Codes, scales and zero points -> float32 weights of the codes' shape."""
    if grid.rotate is not None:
        return rotate_(decode(coded, grid.unrotated), grid.rotate)
    if grid.column_scales:
        rows, by_row = _rows(coded.codes), replace(grid, column_scales=False)
        w = decode(Codes(coded.codes, coded.scales[:rows]), by_row)
        w.view(rows, coded.scales.size(0) - rows).mul_(coded.scales[rows:].float().T).add_(0.0)
        return w
    weights = grid.table.from_codes(coded.codes.contiguous())
    views = group_views(weights, grid)
    counts = [view.size(1) for view in views]
    scales = coded.decoding_scales.split(counts, dim=1)
    zeros = [None] * len(views) if coded.zeros is None else coded.zeros.float().split(counts, dim=1)
    for view, scale, zero in zip(views, scales, zeros, strict=True):
        # In place: a second copy would double the memory of a reader.
        decode_view(view, grid, scale, zero)
    return weights


def snap(w: Tensor, grid: Grid, scales: Tensor | None = None) -> Tensor:
    """The weight that an artifact on this grid would give back for ``w``."""
    return decode(encode(w, grid, scales), grid)


def check_finite(name: str, w: Tensor, scales: Tensor) -> None:
    """Raise ValueError naming the tensor (and row) if its weights or scales are not finite."""
    if not torch.isfinite(w).all():
        raise ValueError(f"tensor {name} holds NaN or infinity")
    is_bad = ~torch.isfinite(scales.float())
    bad_rows = is_bad.reshape(len(scales), -1).any(dim=1).nonzero().flatten()
    if len(bad_rows):
        dtype = str(scales.dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor {name}, row {int(bad_rows[0])}: its scale overflows {dtype}; "
            "use a wider scale_dtype"
        )
