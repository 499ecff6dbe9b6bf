"""The budget solver on made-up tensors: sizes are real, losses as predicted, limits are held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from qat.artifact.container import pack
from qat.budget.budget import Budget
from qat.budget.candidates import Choice, Stored, TrainedTensor
from qat.budget.solver import Solver
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan
from qat.quantize.rounding import rotated

INT6 = Grid(bits=6)


def source(seed: int, shape: tuple[int, int] = (96, 80), grid: Grid = INT6) -> TrainedTensor:
    """A matrix whose rows and columns have scales and sensitivities of their own."""
    generator = torch.Generator().manual_seed(seed)

    def spread(size: tuple[int, int], width: float) -> torch.Tensor:
        return torch.exp(width * torch.randn(size, generator=generator))

    rows, columns = shape
    w = torch.randn(shape, generator=generator) * spread((rows, 1), 0.3) * spread((1, columns), 0.3)
    sensitivity = spread((rows, 1), 1.0) * spread((1, columns), 1.0)
    return TrainedTensor(Entry(f"w{seed}", shape, grid), 0.1 * w, 0.1 * w, sensitivity)


def solver(sources: Sequence[TrainedTensor]) -> Solver:
    return Solver(sources, [one.costs() for one in sources])


def size_of(stored: Sequence[Stored]) -> int:
    encoded = [item.encode() for item in stored]
    return len(pack(encoded, Plan([item.entry for item in stored]), {}, "mix"))


@pytest.fixture(scope="module")
def measured() -> Solver:
    return solver([source(seed) for seed in range(4)])


@pytest.mark.parametrize("bits", [1.0, 1.7, 2.5, 3.0, 4.0, 5.0, 7.0])
def test_the_file_fills_the_limit_and_is_never_above(measured: Solver, bits: float) -> None:
    budget = int(4 * 96 * 80 * bits / 8)
    fitted = measured.solve(Budget(budget), size_of)
    assert fitted.note is None
    assert 0.999 * budget <= size_of(fitted.stored) == fitted.num_bytes <= budget


@pytest.fixture(scope="module")
def many() -> Solver:
    return solver([source(seed, (48, 48)) for seed in range(24)])


@pytest.mark.parametrize("bits", [7.6, 8.0, 9.0, 11.0])
def test_limits_beyond_8_bits_are_filled_tensor_by_tensor(many: Solver, bits: float) -> None:
    """Where codes are as fine as they get, only fp16 adds bytes, a tensor at a time."""
    budget = int(24 * 48 * 48 * bits / 8)
    fitted = many.solve(Budget(budget), size_of)
    assert fitted.note is None
    assert 0.999 * budget <= fitted.num_bytes <= budget


def test_more_bytes_lose_less(measured: Solver) -> None:
    losses = [
        measured.solve(Budget(limit), size_of).predicted_loss for limit in (8000, 12000, 16000)
    ]
    assert losses[0] > 2 * losses[1] > 4 * losses[2]


def test_a_limit_that_does_not_bind_says_so(measured: Solver) -> None:
    fitted = measured.solve(Budget(10**6), size_of)
    assert fitted.note == "the limit does not bind"
    assert all(choice.plain for choice in fitted.choices)


def test_a_limit_below_everything_says_so(measured: Solver) -> None:
    fitted = measured.solve(Budget(300), size_of)
    assert fitted.note == "nothing in the family is smaller"
    assert fitted.num_bytes == size_of(fitted.stored) > 300


def test_a_price_finds_the_best_plan_of_its_size(measured: Solver) -> None:
    """Against all combinations of a few candidates: nothing smaller loses less."""
    few = [costs[2:60:9] for costs in measured.costs[:3]]
    small = Solver(measured.sources[:3], few)
    for bits in (35_000, 55_000, 80_000):
        chosen = small._of_estimated_bits(bits)[0]
        size, loss = sum(c.bits for c in chosen), sum(c.loss for c in chosen)
        assert size <= bits
        plans = list(itertools.product(*few))
        best = min(sum(c.loss for c in p) for p in plans if sum(c.bits for c in p) <= size)
        assert loss == pytest.approx(best, rel=1e-9)


def test_predicted_loss_is_that_of_the_stored_weights() -> None:
    one = source(1)
    for choice in (cost.choice for cost in one.costs()[::7]):
        stored = one.stored(choice, zoom=1.1)
        back = stored.encode().decode()
        expected = 0.5 * ((back - one.reference).double().square() * one.sensitivity).sum()
        assert one.loss_of(stored) == pytest.approx(float(expected), rel=1e-4, abs=1e-12)


def test_the_rotation_that_is_planned_is_kept() -> None:
    """Where a grid can rotate, and with scales of rotated weights; the limit is filled as ever."""
    turned = Grid(bits=6, rotate=16)
    one, plain = source(1, grid=turned), source(1)
    for cost in one.costs():
        grid = one.stored(cost.choice).entry.grid
        by_products = cost.choice.rule is not None and cost.choice.rule.exponent is not None
        if grid is not None:
            assert grid.rotate == (None if by_products else 16)
        if cost.choice.rule is not None and not by_products:
            w = rotated(one.reference, turned)
            rotated_first = replace(plain, trained=w, reference=w).stored(cost.choice)
            assert one.stored(cost.choice).entry.grid.unrotated == rotated_first.entry.grid
    rotating = solver([source(seed, grid=turned) for seed in range(4)])
    budget = 4 * 96 * 80 * 3 // 8
    fitted = rotating.solve(Budget(budget), size_of)
    assert 0.999 * budget <= size_of(fitted.stored) <= budget


def test_estimated_bits_are_near_the_coded_ones() -> None:
    one = source(2, (288, 288))
    for cost in one.costs()[::2]:
        if cost.choice.rule is None or not 0.05 < cost.choice.size < 1.5:
            continue
        coded = 8 * (size_of([one.stored(cost.choice)]) - size_of([]))
        assert cost.bits == pytest.approx(coded, rel=0.08), cost.choice


def test_no_code_is_clipped_by_its_bit_width() -> None:
    one = source(3)
    for choice in (cost.choice for cost in one.costs()):
        grid = one.stored(choice).entry.grid
        if choice.rule is None or grid is None or grid.bits == 8:
            continue
        stored = one.stored(choice)
        wide = replace(grid, bits=8)
        if grid.scale_rule == "sigma":
            wide = replace(wide, sigma=grid.sigma * 127 / (2 ** (grid.bits - 1) - 1))
        again = Stored(replace(stored.entry, grid=wide), stored.weights, stored.scales)
        torch.testing.assert_close(stored.encode().decode(), again.encode().decode())


def test_products_of_scales_beat_one_scale_where_sensitivities_differ(measured: Solver) -> None:
    fitted = measured.solve(Budget(12_000), size_of)
    assert {choice.rule.name for choice in fitted.choices if choice.rule} <= {
        "product 0.75", "product 1",
    }  # fmt: skip


def test_after_qat_the_trained_grid_costs_nothing_and_is_kept_if_it_fits() -> None:
    """The reference is what training saw; masters on the planned grid are exactly that."""
    trained = [source(seed) for seed in range(3)]
    after = [replace(one, reference=Stored(one.entry, one.trained).encode().decode())
             for one in trained]  # fmt: skip
    measured = solver(after)
    planned = [one.stored(Choice(None)) for one in after]
    fitted = measured.solve(Budget(size_of(planned) + 10), size_of)
    assert fitted.predicted_loss == 0.0
    assert all(choice == Choice(None) for choice in fitted.choices)
    smaller = measured.solve(Budget(int(0.9 * size_of(planned))), size_of)
    assert smaller.note is None
    assert smaller.predicted_loss > 0.0


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_tensors_without_spread_or_sensitivity_are_stored(fill: float) -> None:
    w = torch.full((8, 8), fill)
    flat = TrainedTensor(Entry("flat", (8, 8), INT6), w, w, torch.zeros(8, 8))
    for cost in flat.costs():
        assert torch.isfinite(flat.stored(cost.choice).encode().decode()).all()
        assert cost.loss == 0.0


def test_not_finite_weights_are_refused() -> None:
    one = source(6)
    one.reference[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        one.costs()


def test_below_a_bit_scales_are_wider_than_the_spread() -> None:
    """Where most codes are 0, scales of up to ten standard deviations lose least."""
    sources = [source(seed) for seed in range(4)]
    budget = int(4 * 96 * 80 * 0.6 / 8)
    fitted = solver(sources).solve(Budget(budget), size_of)
    narrow = [[c for c in one.costs() if c.choice.size <= 2.0] for one in sources]
    narrow_fit = Solver(sources, narrow).solve(Budget(budget), size_of)
    assert fitted.note is None
    assert max(choice.size for choice in fitted.choices) > 2.0
    assert fitted.predicted_loss < 0.8 * narrow_fit.predicted_loss
