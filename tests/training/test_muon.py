"""The batched Muon against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch

from qat.training.muon import Muon, newton_schulz

SHAPES = [(32, 32), (32, 32), (16, 32), (64, 32), (32, 64), (16, 32), (64, 32)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_follows_torchs_muon(weight_decay: float) -> None:
    """In bfloat16, as torch's iterates; products of batches may round otherwise."""
    ours, theirs = parameters(), parameters()
    batched = Muon(ours, lr=0.04, momentum=0.9, weight_decay=weight_decay)
    single = torch.optim.Muon(
        theirs, lr=0.04, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="original"
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        batched.step()
        single.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=5 * 0.04 * 2**-7)  # a unit of bfloat16 each step


def test_float32_iteration_is_the_polynomial_of_the_singular_values() -> None:
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    s = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = left @ torch.diag_embed(s) @ right
    assert torch.allclose(newton_schulz(x).double(), expected, atol=1e-4)


def test_a_zero_gradient_moves_nothing_and_vectors_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros(4, 6)
    Muon([p], lr=1.0, momentum=0.9).step()
    assert torch.equal(p, torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"not a tensor of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=1.0, momentum=0.9)


def test_normuon_evens_out_rows_and_keeps_the_norm() -> None:
    """Against a loop over rows (arXiv 2510.05491), the norm kept as the docstring says."""
    beta, lr = 0.8, 0.1
    for shape in ((6, 10), (10, 6)):
        torch.manual_seed(5)
        ours = torch.nn.Parameter(torch.randn(shape))
        plain = torch.nn.Parameter(ours.detach().clone())
        even = Muon([ours], lr, 0.9, dtype=torch.float32, neuron_beta=beta)
        muon = Muon([plain], lr, 0.9, dtype=torch.float32)
        squares = [0.0] * shape[0]
        for _ in range(4):
            before, plain_before = ours.detach().clone(), plain.detach().clone()
            ours.grad = torch.randn(shape)
            plain.grad = ours.grad.clone()
            even.step()
            muon.step()
            update = (plain_before - plain.detach()) / lr  # orthogonal, times Muon's scale
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            rows = []
            for i, row in enumerate(update / scale):
                squares[i] = beta * squares[i] + (1 - beta) * float(row.square().mean())
                rows.append(row / squares[i] ** 0.5)
            expected = torch.stack(rows)
            expected *= update.norm() / expected.norm()
            torch.testing.assert_close(
                (before - ours.detach()) / lr, expected, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("neuron_beta", [None, 0.9])
def test_state_travels(neuron_beta: float | None) -> None:
    """A restored optimizer takes the same step."""
    a, b = parameters(), parameters()
    first, second = (Muon(x, lr=0.1, momentum=0.9, neuron_beta=neuron_beta) for x in (a, b))
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        q.grad = p.grad.clone()
    first.step()
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
