"""Scales at a price: the formula, a code for every weight, and estimates against real files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.artifact.container import pack
from qat.budget.budget import Budget
from qat.budget.price_control import EVERY, File, PriceControl
from qat.budget.priced_scales import HEADROOM, scales_at, scales_at_price_one, zoom_rows
from qat.errors import TrainingError
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan, build_plan
from qat.training.checkpoint import load_checkpoint
from tests.artifact.test_bit_cost import bits_between_codes, to_codes
from tests.conftest import Done, _call

RD = Grid(bits=8, scale_rule="learned", column_scales=True, scale_dtype="bf16")
LAPTOP = ModelSpec(1024, 4, 288, 6, 3, 2, True)


def made(rows: int, columns: int, seed: int, width: float) -> tuple[Entry, Tensor, Tensor]:
    """A matrix and its sensitivities, a row's times a column's."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    row, column = (
        torch.randn(size, generator=generator).mul(width).exp()
        for size in ((rows, 1), (1, columns))
    )
    return Entry("w", (rows, columns), RD), w, row * column


def test_scales_cost_as_much_by_errors_as_they_save_in_bits() -> None:
    """Half of sensitivity * scale ** 2 / 12, derived by log2(scale), is the price of a bit."""
    entry, w, sensitivity = made(40, 30, 0, 0.5)
    price = 1e-4
    scales = scales_at(price, entry, w, scales_at_price_one(entry, sensitivity))
    product = scales[:40] * scales[40:].T
    by_errors = sensitivity * product.square() / 12 * math.log(2)
    assert float(by_errors.log().median().exp()) == pytest.approx(price, rel=0.05)


@given(st.integers(0, 1000), st.floats(-40, 0), st.floats(0.0, 3.0))
def test_at_any_price_every_weight_has_a_code(seed: int, log2_price: float, width: float) -> None:
    entry, w, sensitivity = made(12, 20, seed, width)
    scales = scales_at(2.0**log2_price, entry, w, scales_at_price_one(entry, sensitivity))
    largest = (w.abs() / (scales[:12] * scales[12:].T)).max()
    assert float(largest) <= HEADROOM * 127 * (1 + 1e-5)
    zoom_rows(entry, w, scales, 0.25)
    largest = (w.abs() / (scales[:12] * scales[12:].T)).max()
    assert float(largest) <= HEADROOM * 127 * (1 + 1e-5)


def test_one_column_that_matters_does_not_widen_all_rows() -> None:
    """A sensitive column wants scales finer than 8 bits allow; other columns are not to pay."""
    entry, w, _ = made(64, 64, 1, 0.0)
    sensitivity = torch.ones(64, 64)
    sensitivity[:, 7] = 1e6
    scales = scales_at(1e-3, entry, w, scales_at_price_one(entry, sensitivity))
    wanted = math.sqrt(12 * 1e-3 / math.log(2))
    others = (scales[:64] * scales[64:].T)[:, torch.arange(64) != 7]
    assert float(others.median()) < 1.5 * wanted


def control_of(plan: Plan, limit_bytes: int, coder: str = "constriction") -> PriceControl:
    def encode_file(masters, scales) -> File:
        return File(len(pack(plan.encode(masters, scales), plan, {}, coder)), 0.0)

    return PriceControl(plan, Budget(limit_bytes), 4096, encode_file, None)


def plan_of(weights: dict[str, Tensor]) -> Plan:
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return build_plan(shapes, {"grid": RD}, {"*.weight": "grid", "*": "fp32"})


def observed_alike(control: PriceControl, weights: dict[str, Tensor]) -> None:
    """As if a tensor's weights all mattered alike: scales as wide as the weights, then."""
    control.squares = {
        name: torch.full_like(w, 1e-6 / float(w.var())) for name, w in weights.items()
    }
    control.squares_weight = 1.0


def share_estimated(weights: dict[str, Tensor], bits: float) -> float:
    """Estimated / really coded bits, of scales found for a limit, before anything is adapted."""
    generator = torch.Generator().manual_seed(5)
    plan = plan_of(weights)
    num_weights = sum(entry.num_elements for entry in plan.on_grid)
    control = control_of(plan, int(num_weights * bits / 8))
    control.squares_weight = 1.0
    for entry in plan.on_grid:
        rows, columns = entry.shape
        row, column = (
            torch.randn(size, generator=generator).mul(0.5).exp()
            for size in ((rows, 1), (1, columns))
        )
        control.squares[entry.name] = row * column / 1e3
    scales = control.first_scales(weights)
    control.ratio = 1.0
    estimated = control.estimate.measure(weights, scales)
    return estimated / 8 / control.encode_file(weights, scales).num_bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_estimates_of_random_weights_are_within_1_percent(bits: int) -> None:
    torch.manual_seed(0)
    weights = {name: 0.02 * torch.randn_like(p) for name, p in GPT(LAPTOP).named_parameters()}
    assert share_estimated(weights, bits) == pytest.approx(1.0, abs=0.01)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done: Done = _call("train.py", [
            "profile=laptop", "budget_seconds=null", "max_steps=100", "run_name=t",
            "schedule.warmdown_steps=30", "batch_tokens=1024", "eval.max_tokens=1024",
        ])  # fmt: skip
    assert done.code == 0, done.err
    state = load_checkpoint(folder / "logs" / "runs" / "t" / "checkpoint.ckpt")
    assert state is not None
    return state["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_estimates_of_trained_weights_are_within_1_percent(
    bits: int, trained: dict[str, Tensor]
) -> None:
    assert share_estimated(trained, bits) == pytest.approx(1.0, abs=0.01)


def test_pulls_are_finite_differences_of_the_bits() -> None:
    """Of weights and of both kinds of scales, with the tables of the codes taken as fixed."""
    entry, w, _ = made(30, 24, 2, 0.3)
    grid = Grid(bits=8, scale_rule="learned", column_scales=True, scale_dtype="fp32")
    entry = Entry("w", (30, 24), grid)
    generator = torch.Generator().manual_seed(3)
    scales = 0.2 + 0.3 * torch.rand(54, 1, generator=generator)
    scales[30:] += 0.6
    control = control_of(Plan([entry]), 10**6)
    control.estimate.measure({"w": w}, {"w": scales})
    codes = to_codes(w / (scales[:30] * scales[30:].T))

    def bits(weights: Tensor, of: Tensor) -> float:
        wide = weights.double() / (of[:30].double() * of[30:].double().T)
        return float(bits_between_codes(wide.numpy(), codes).sum())

    def difference(kind: str, at: tuple[int, int], by: float) -> float:
        values = []
        for move in (by, -by):
            moved = {"w": w.double().clone(), "scales": scales.double().clone()}
            moved[kind][at] += move
            values.append(bits(moved["w"], moved["scales"]))
        return (values[0] - values[1]) / (2 * by)

    pull, scale_pull = control.estimate.pulls["w"], control.estimate.scale_pulls["w"][:, 0]
    agree = [
        difference("w", (i, j), 1e-6) == pytest.approx(float(pull[i, j]), rel=1e-2, abs=1e-2)
        for i in range(0, 30, 3)
        for j in range(0, 24, 3)
    ]
    assert sum(agree) >= len(agree) - 1  # one may lie on a corner
    scale = [math.sqrt(24 * 127)] * 30 + [math.sqrt(30 * 127)] * 24  # LSQ's
    for i in range(0, 54, 5):
        found = difference("scales", (i, 0), 1e-8)
        assert found == pytest.approx(float(scale_pull[i]) * scale[i], rel=0.02)


def test_a_price_is_in_nats_per_token() -> None:
    """Gradients are of the mean over a batch: their squares are as much smaller as it is large."""
    plan = plan_of({"w.weight": torch.zeros(8, 8)})
    price, gradient, tokens = 1e-5, 0.01, 4096
    control = PriceControl(plan, Budget(10**6), tokens, lambda *_: File(0, 0.0), price)
    w = torch.zeros(8, 8, requires_grad=True)
    w.grad = torch.full((8, 8), gradient)
    for _ in range(3):
        control.observe({"w.weight": w})
    scales = control.first_scales({"w.weight": w.detach()})["w.weight"]
    wanted = math.sqrt(12 * price / (math.log(2) * gradient**2 * tokens))
    product = scales[:8] * scales[8:].T
    torch.testing.assert_close(product, torch.full((8, 8), wanted), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("price", [1e-5, None])
def test_a_fork_has_the_price_that_is_given_to_it(price: float | None) -> None:
    """And not that of its trunk, which found its own."""
    plan = plan_of({"w.weight": torch.zeros(8, 8)})
    trunk = control_of(plan, 10**6)
    trunk.price, trunk.ratio = 3e-4, 1.1
    control = PriceControl(plan, Budget(10**6), 4096, lambda *_: File(0, 0.0), price)
    control.load_state(trunk.state())
    assert control.price == (price or 3e-4)
    assert control.ratio == 1.1


def test_a_matrix_that_no_gradient_reached_has_no_scale_yet() -> None:
    control = control_of(plan_of({"w.weight": torch.zeros(8, 8)}), 10**6)
    w = torch.ones(8, 8, requires_grad=True)
    w.grad = torch.zeros(8, 8)
    control.observe({"w.weight": w})
    with pytest.raises(TrainingError, match=r"no gradient reached w\.weight before the"):
        control.first_scales({"w.weight": w.detach()})


def test_gradients_gain_price_times_pulls() -> None:
    _, w, _ = made(30, 24, 2, 0.3)
    plan, price = plan_of({"w.weight": w}), 3e-4
    control = PriceControl(plan, Budget(10**6), 4096, lambda *_: File(0, 0.0), price)
    masters = {"w.weight": w.clone().requires_grad_()}
    scales = {"w.weight": torch.full((54, 1), 0.5).requires_grad_()}
    for tensor in (masters["w.weight"], scales["w.weight"]):
        tensor.grad = torch.ones_like(tensor)
    control.add_gradients(masters, scales)
    for tensors, pulls in (
        (masters, control.estimate.pulls),
        (scales, control.estimate.scale_pulls),
    ):
        pull = pulls["w.weight"]
        assert float(pull.abs().mean()) > 0.1
        gained = tensors["w.weight"].grad
        assert gained is not None
        torch.testing.assert_close(gained, 1 + price * pull.view_as(gained))


def test_a_file_too_large_makes_bits_dearer_and_one_too_small_cheaper() -> None:
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(300, 200)}
    control = control_of(plan_of(weights), 20_000)
    observed_alike(control, weights)
    scales = control.first_scales(weights)
    for tensor in (*weights.values(), *scales.values()):
        tensor.grad = torch.zeros_like(tensor)
    for limit_bytes in (16_000, 24_000):
        before, control.budget = control.price, Budget(limit_bytes)
        for _ in range(4 * EVERY):
            control.add_gradients(weights, scales)
        assert (control.price > before) == (limit_bytes < 20_000)
        assert control.estimate.bits(weights, scales) / 8 == pytest.approx(limit_bytes, rel=0.01)


def test_landing_from_far_off_ends_in_the_window() -> None:
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(300, 200), "b.weight": torch.randn(200, 300).mul(0.1)}
    plan = plan_of(weights)
    for limit_bytes in (18_000, 40_000, 70_000):
        control = control_of(plan, limit_bytes)
        observed_alike(control, weights)
        scales = control.first_scales(weights)
        for scale in scales.values():
            scale.mul_(1.2)
        control.land(weights, scales)
        assert 0.999 <= control.encode_file(weights, scales).num_bytes / limit_bytes <= 1.0


@pytest.mark.slow
def test_a_real_model_ends_in_the_window_at_every_limit(
    trained: dict[str, Tensor], tmp_path: Path, train: Callable[..., Done]
) -> None:
    plan = plan_of(trained)
    num_weights = sum(entry.num_elements for entry in plan.on_grid)
    for bits in (1, 2, 3, 4, 6):
        limit_bytes = num_weights * bits // 8
        control = control_of(plan, limit_bytes, "mix")
        observed_alike(control, trained)
        scales = control.first_scales(trained)
        control.land(trained, scales)
        assert 0.999 <= control.encode_file(trained, scales).num_bytes / limit_bytes <= 1.0
