"""GPTQ: columns are rounded one after the other, and each makes up for the errors before it.

What a layer computes wrongly: one that reads x and stores w + error instead of w is off by error @
x. The mean of the square over tokens needs no activations, only their second moments: with hessian
H = mean of x x^T it is error @ H @ error^T, and each row of a matrix has its own.

GPTQ minimises Tr(E H E^T), E = stored - trained weight. It is written the way of QuIP's theorem,
not by the inverse of H: with H = U D U^T (U upper triangular with ones on its diagonal) column k is
rounded from

    w_k + (w_<k - stored_<k) @ U[<k, k]

which gives the same codes (arXiv 2307.13304), and needs one Cholesky factorisation. Everything but
the rounding itself is float64, so that no code hangs on the order of a sum.

Scales and zero points are those that rounding to nearest would store, found from the trained
weights before the first column moves; so groups mean the same with ``act_order`` (columns of large
activations first) and without, and any grid will do. Scales found anew from the moved weights where
a group starts were measured and left out: on random matrices Tr(E H E^T) is 1.00 to 1.07 times as
large with int4 in groups of 64, and 1.07 to 1.5 times with int3.

Source: Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.grid import Grid
from qat.quantize.rounding import (
    Codes,
    Coding,
    decode,
    decode_view,
    encode,
    encode_view,
    in_scale_units,
    rotated,
)


def row_output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared output error of each row, (rows,) float64; their sum is Tr(E H E^T).

    ``error`` is (rows, columns) and ``hessian`` (columns, columns), the mean of x x^T over tokens.
    """
    hessian = hessian.double()
    parts = (rows.double() for rows in error.split(BLOCK_ROWS))
    return torch.cat([(wide @ hessian).mul_(wide).sum(1) for wide in parts])


def rotated_hessian(hessian: Tensor, grid: Grid) -> Tensor:
    """That of what rotated weights read: both sides multiplied as ``rotated`` multiplies rows."""
    return rotated(rotated(hessian, grid).T, grid)


BLOCK_ROWS = 4096  # as float64 at a time: a head has many
BLOCK_COLUMNS = 64  # rounded between two large matrix products; the codes do not depend on it


class BitPrices(NamedTuple):
    """What codes of symmetric int levels cost a coder, and what that is worth.

    ``bits`` (classes, 256) of a code + 128 in a place of a class; ``classes`` (rows, columns) of
    the places; ``per_bit`` (rows, 1): the squared output error that a bit is worth.
    """

    bits: Tensor
    classes: Tensor
    per_bit: Tensor

    def of_rows(self, codes: Tensor) -> Tensor:
        """Whole codes (rows, columns) -> (rows,), in squared output error."""
        bits = self.bits[self.classes.long(), codes.long() + 128]
        return self.per_bit[:, 0] * bits.sum(1)

    def of_column(self, codes: Tensor, column: int) -> Tensor:
        """Codes (rows,) of a column -> (rows,), in squared output error."""
        bits = self.bits[self.classes[:, column].long(), codes.long() + 128]
        return self.per_bit[:, 0] * bits


class GptqFactor:
    """What all matrices that read one input share: the order of columns, and what errors feed.

    ``hessian`` is (columns, columns), the mean of x x^T over tokens; ``damping`` times the mean of
    its diagonal is added to the diagonal. A column whose input is always zero is rounded to
    nearest. ValueError for a hessian or damping that cannot be used.
    """

    def __init__(self, hessian: Tensor, damping: float = 0.01, act_order: bool = False) -> None:
        if hessian.dim() != 2 or hessian.size(0) != hessian.size(1):
            raise ValueError(f"hessian of shape {tuple(hessian.shape)}: it has to be square")
        if not torch.isfinite(hessian).all():
            raise ValueError("hessian holds NaN or infinity")
        if not damping >= 0.0:
            raise ValueError(f"damping = {damping}: give 0 or more")
        self._hessian = hessian.double()
        diagonal = self._hessian.diagonal()
        self._order = torch.arange(len(diagonal), device=hessian.device)
        if act_order:
            self._order = diagonal.argsort(descending=True, stable=True)
        damped = self._hessian[self._order][:, self._order]
        damped.diagonal().add_(damping * diagonal.mean() + (damped.diagonal() == 0))
        # The factor of the reversed matrix, reversed, is upper triangular.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if failed:
            raise ValueError(
                f"damping = {damping}: the hessian is not positive definite; "
                "give more damping or more calibration tokens"
            )
        upper = lower.flip(0, 1)
        self._feedback = (upper / upper.diagonal()).T.contiguous()
        self._own_errors = upper.diagonal().square()  # what a column's own error counts

    @torch.no_grad()
    def quantize(
        self,
        w: Tensor,
        grid: Grid,
        scales: Tensor | None = None,
        prices_of: Callable[[Codes, Tensor], BitPrices] | None = None,
    ) -> Codes:
        """Float32 weights (rows, columns) -> codes, with the scales that ``encode`` would store.

        GPTQ alone may end further from the trained outputs than rounding to nearest does (errors
        pushed on to columns that have no room left). Rows do not depend on each other, so of each
        row the better of both is kept: Tr(E H E^T) is never above that of ``encode``.

        With prices a code may be the next nearer 0 if that saves more bits than it adds error, and
        the better row is the one of less error and bits. ``prices_of``: codes rounded to nearest,
        and of each column what its own squared error counts, (columns,) float64: of Tr(E H E^T) the
        share that columns after it cannot make up for. ValueError if ``w`` does not fit the
        hessian, or the grid rotates: weights and hessian are then to be rotated first.
        """
        if grid.rotate is not None:
            raise ValueError(f"rotate = {grid.rotate}: give rotated weights and hessian")
        if w.dim() != 2 or w.size(1) != len(self._order):
            raise ValueError(
                f"weights of shape {tuple(w.shape)}: the hessian has {len(self._order)} columns"
            )
        nearest = encode(w, grid, scales)
        prices = None if prices_of is None else prices_of(nearest, self.own_errors)
        fed = nearest._replace(codes=self._fed_codes(w, grid, nearest, prices))

        def costs(coded: Codes) -> Tensor:
            errors = row_output_errors(decode(coded, grid) - w, self._hessian)
            return errors if prices is None else errors + prices.of_rows(coded.codes)

        is_better = (costs(fed) < costs(nearest))[:, None]
        return nearest._replace(codes=torch.where(is_better, fed.codes, nearest.codes))

    @property
    def own_errors(self) -> Tensor:
        """(columns,) float64: what a squared error counts that the columns after it make up for as
        far as they can; Tr(E H E^T) is the sum over these."""
        in_place = torch.empty_like(self._own_errors)
        in_place[self._order] = self._own_errors
        return in_place

    def _fed_codes(self, w: Tensor, grid: Grid, nearest: Codes, prices: BitPrices | None) -> Tensor:
        trained = w.T[self._order]  # a column of weights is a row here: contiguous
        errors = torch.zeros_like(trained, dtype=torch.float64)
        codes = torch.empty_like(trained)
        levels = _ColumnLevels(nearest, grid)
        order = self._order.tolist()
        for start in range(0, len(order), BLOCK_COLUMNS):
            block = slice(start, min(start + BLOCK_COLUMNS, len(order)))
            targets = trained[block].double().addmm_(self._feedback[block, :start], errors[:start])
            for k in range(block.start, block.stop):
                feedback = self._feedback[k, start:k]
                target = torch.addmv(targets[k - start], errors[start:k].T, feedback).float()
                codes[k] = levels.nearest(target, order[k])
                if prices is not None:
                    own = float(self._own_errors[k])
                    codes[k] = _cheaper(target, codes[k], order[k], levels, own, prices)
                torch.sub(trained[k].double(), levels.weights(codes[k], order[k]), out=errors[k])
        in_place = torch.empty_like(w)
        in_place[:, self._order] = codes.T
        return grid.table.to_codes(in_place)


class _ColumnLevels:
    """The levels of each column of a matrix: those that its stored scales and zeros decode to."""

    def __init__(self, coded: Codes, grid: Grid) -> None:
        rows, columns = coded.codes.shape
        scales = coded.decoding_scales
        self._column_scales = scales.new_ones(columns)
        if grid.column_scales:
            scales, self._column_scales = scales[:rows], scales[rows:, 0]
        self._steps = scales.T.contiguous()  # (groups, rows)
        self._zeros = None if coded.zeros is None else coded.zeros.float().T.contiguous()
        self._group_size = grid.group_size or columns
        self._grid = grid

    def nearest(self, target: Tensor, column: int) -> Tensor:
        """(rows,) weights -> their codes as float32 numbers."""
        group = column // self._group_size
        scale = self._steps[group]
        zero = None if self._zeros is None else self._zeros[group]
        scaled = in_scale_units(target[:, None], self._column_scales[column])
        return encode_view(scaled, self._grid, Coding(scale, scale, zero))[:, 0]

    def weights(self, codes: Tensor, column: int) -> Tensor:
        """What the codes (rows,) of a column stand for."""
        group = column // self._group_size
        zero = None if self._zeros is None else self._zeros[group]
        decoded = decode_view(codes[:, None].clone(), self._grid, self._steps[group], zero)
        return decoded[:, 0] * self._column_scales[column]


def _cheaper(
    target: Tensor, codes: Tensor, column: int, levels: _ColumnLevels, own: float, prices: BitPrices
) -> Tensor:
    """The codes (rows,) given, or the next nearer 0 where bits outweigh errors. ``own``: what
    an error of this column counts."""
    nearer = codes - codes.sign()
    more, less = (
        own * (target - levels.weights(c, column)).square() + prices.of_column(c, column)
        for c in (codes, nearer)
    )
    return torch.where(less < more, nearer, codes)
