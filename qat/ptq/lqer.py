"""LQER: what quantization lost of a matrix, put back by two thin fp16 matrices.

The error E = trained - stored, its columns weighted by the size of the inputs they read, is cut to
its ``rank`` largest singular values (activations' root mean squares, the root of the hessian's
diagonal, make them count where they show):

    E diag(s) = U S V^T,   left = U sqrt(S),   right = sqrt(S) V^T diag(1 / s)

so that stored + left @ right has the least error of any such pair, were the inputs uncorrelated.
Left out: 8-bit factors, as in the paper.

Source: Zhang et al., arXiv 2402.02446.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quantize.rounding import in_scale_units


class Correction(NamedTuple):
    """fp16 factors: left (rows, rank), right (rank, columns)."""

    left: Tensor
    right: Tensor

    def added_to(self, stored: Tensor) -> Tensor:
        """The weights (rows, columns) that a model computes with, float32."""
        return torch.addmm(stored, self.left.float(), self.right.float())

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors, before any coder."""
        return self.left.nbytes + self.right.nbytes


@torch.no_grad()
def lqer(w: Tensor, stored: Tensor, hessian_diagonal: Tensor, rank: int) -> Correction:
    """Factors that bring ``stored`` nearer to ``w``, both (rows, columns) float32.

    ``hessian_diagonal`` (columns,) is the mean square of each input; a column whose input is always
    zero is not corrected. ValueError for a rank that the shape does not have, or an input that is
    not finite.
    """
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank = {rank}: give 1 to {min(w.shape)} for shape {tuple(w.shape)}")
    size = hessian_diagonal.double().sqrt()
    size = in_scale_units(size, size.mean())  # so that both factors suit fp16
    weighted = (w.double() - stored.double()) * size
    if not torch.isfinite(weighted).all():
        raise ValueError("weights or hessian hold NaN or infinity")
    u, singular, vt = torch.linalg.svd(weighted, full_matrices=False)
    root = singular[:rank].sqrt()
    left, right = u[:, :rank] * root, in_scale_units(root[:, None] * vt[:rank], size)
    return Correction(left.half(), right.half())
