"""What a layer computes wrongly: the error that post-training methods with data make small.

A layer that reads x and stores w + error instead of w is off by error @ x. The mean of the square
over tokens needs no activations, only their second moments: with hessian = mean of x x^T it is
error @ hessian @ error^T, and each row of a matrix has its own, whatever the other rows do.
"""

from __future__ import annotations

from torch import Tensor


def row_output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared output error of each row, (rows,) float64; their sum is Tr(E H E^T).

    ``error`` is (rows, columns) and ``hessian`` (columns, columns), the mean of x x^T over tokens.
    """
    wide = error.double()
    return (wide @ hessian.double()).mul_(wide).sum(1)
