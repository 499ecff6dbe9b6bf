"""Muon, all matrices of one shape at once.

Momentum, then the nearest (semi-)orthogonal matrix to it by five quintic Newton-Schulz iterations,
as in Jordan et al., "Muon" (2024) and the challenge's baseline. What differs from
``torch.optim.Muon``, which refuses stacked matrices: matrices of equal shape (up to transposition)
are stacked and iterated as one batch, under DDP each rank iterates its share of every batch and
gathers the others', and the iteration's dtype is a choice. Weight decay is decoupled and 0 in the
baseline. With ``neuron_beta`` it is NorMuon (arXiv 2510.05491): rows of the orthogonal matrix are
divided by a running root mean square of their own, and the matrix keeps its Frobenius norm, so that
learning rates mean the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def newton_schulz(x_BRC: Tensor) -> Tensor:
    """Each matrix of a batch (rows <= columns) -> about its nearest orthogonal one, same dtype."""
    a, b, c = COEFFICIENTS
    x = x_BRC / torch.linalg.vector_norm(x_BRC, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(Optimizer):
    """Matrices only. ``dtype`` is that of the iteration: bfloat16, or float32 to compare runs."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        neuron_beta: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.neuron_beta = dtype, neuron_beta
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon takes matrices, not a tensor of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter; a collective call under DDP."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    if self.neuron_beta is not None:
                        self.state[p]["neuron_square"] = p.new_zeros(p.size(0), 1)
            directions = self._nesterov(params, group["momentum"])
            batches: dict[tuple[int, int], list[int]] = {}
            for i, p in enumerate(params):
                batches.setdefault((min(p.shape), max(p.shape)), []).append(i)
            gathered = [
                (members, _orthogonalized([directions[i] for i in members], self.dtype))
                for members in batches.values()
            ]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for members, (wait, x_BRC) in gathered:
                wait()
                for i, x in zip(members, x_BRC.float().unbind(), strict=False):
                    p = params[i]
                    rows, columns = p.shape
                    scale = max(1.0, rows / columns) ** 0.5
                    update = x if rows <= columns else x.mT
                    if self.neuron_beta is not None:
                        update = self._by_neuron(update, self.state[p]["neuron_square"])
                    p.add_(update, alpha=-group["lr"] * scale)

    def _by_neuron(self, update_RC: Tensor, square_R1: Tensor) -> Tensor:
        assert self.neuron_beta is not None
        square_R1.lerp_(update_RC.square().mean(1, keepdim=True), 1 - self.neuron_beta)
        evened = update_RC / square_R1.sqrt().clamp(min=EPS)
        return evened * (update_RC.norm() / evened.norm().clamp(min=EPS))

    def _nesterov(self, params: list[Tensor], momentum: float) -> list[Tensor]:
        gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))


def _orthogonalized(
    matrices: list[Tensor], dtype: torch.dtype
) -> tuple[Callable[[], object], Tensor]:
    """(wait, batch): the batch is complete after ``wait()``; under DDP it is being gathered."""
    wide = [m if m.size(0) <= m.size(1) else m.mT for m in matrices]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: None, newton_schulz(torch.stack(wide).to(dtype))
    ranks = dist.get_world_size()
    share = -(-len(wide) // ranks)
    start = dist.get_rank() * share
    own = torch.zeros(share, *wide[0].shape, dtype=dtype, device=wide[0].device)
    if mine := wide[start : start + share]:
        own[: len(mine)] = newton_schulz(torch.stack(mine).to(dtype))
    batch = torch.empty(ranks * share, *wide[0].shape, dtype=dtype, device=own.device)
    work = dist.all_gather_into_tensor(batch, own, async_op=True)
    return work.wait, batch
