"""Gradient rules against their formulas, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torchao.prototype.parq.optim.parq import ProxPARQ

from qat.qat_model import QatModel
from qat.quantize.gradients import GradientRule, make_rule, rule_kinds
from qat.quantize.gradients.soft_round import temperature
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.rounding import encode, scales_of, snap
from qat.quantize.switch import QatSwitch
from qat.settings.options import read_grid
from tests.conftest import compiles

GRID = Grid(bits=4, scale_rule="sigma", sigma=2.0, group_size=10, scale_dtype="fp32")


@pytest.fixture
def w() -> torch.Tensor:
    return torch.randn(6, 25, generator=torch.Generator().manual_seed(0))


def per_weight(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().repeat_interleave(10, 1)[:, :25]


def gradient(w: torch.Tensor, rule: str, grid: Grid = GRID, scale_gradient: bool = False):
    """(seen, dL/dw, dL/dscale) for L = sum(c * seen) with fixed random c, through the switch."""
    plan = build_plan({"w": tuple(w.shape)}, {"grid": grid}, {"*": "grid"})
    switch = QatSwitch(plan, rule)
    master = torch.nn.Parameter(w.clone())
    switch.refresh({"w": master}, True, progress=0.5)
    seen = switch.weights({"w": master})["w"]
    c = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    (c * seen).sum().backward()
    scales = next(iter(switch.parameters()), None)
    return seen.detach(), master.grad, c, scales


COMPILED = {
    "int": Grid(bits=4, scale_dtype="fp16"),
    "groups": Grid(bits=3, group_size=7),
    "sums": GRID,
    "ragged": Grid("e2m1", group_size=10, scale_rule="power", scale_dtype="e8m0"),
    "learned": Grid(bits=3, scale_rule="learned", group_size=10),
}


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(rule_kinds()))
def test_compiled_it_is_the_same(w: torch.Tensor, rule: str) -> None:
    """Weights that are on their grid bit for bit, all else but for rounding."""
    plain, fused = make_rule(rule), make_rule(rule)
    fused.compiles = True
    w[0] = 0.0
    w[1, :3] = torch.tensor([0.5, -0.5, 1.5])
    for grid in (grid for grid in COMPILED.values() if plain.supports(grid)):
        scales = (
            encode(w, read_grid("int3")).scales.float() if grid.scale_rule == "learned" else None
        )
        masters = w.clone(), w.clone()
        for turn in range(6):
            asked = {"name": grid.label, "progress": 0.2 * turn}
            if scales is not None:
                asked["scales"] = scales.expand(6, 3)
            seen = []
            for made, master in zip((plain, fused), masters, strict=True):
                generator = torch.Generator().manual_seed(turn)
                seen.append(made.see(master, grid, generator=generator, **asked))
                gradient = w.flip(0) * (-1) ** turn  # to and fro
                if made.pulls:
                    made.before_update(master, gradient, seen[-1], grid, rate=0.1, **asked)
                master.add_(gradient, alpha=0.3)
            for one, other in zip(*seen, strict=True):
                assert (one is None) == (other is None)
                if one is not None and plain.is_on_grid:
                    assert torch.equal(one.view(torch.int32), other.view(torch.int32))
                elif one is not None:
                    assert torch.allclose(one, other, atol=1e-5)
            assert torch.allclose(*masters, atol=1e-6)
            state = fused.state()
            assert set(state) == set(plain.state())
            for key, one in plain.state().items():
                atol = 1e-3 if one.dtype == torch.float16 else 1e-6
                assert torch.allclose(one.float(), state[key].float(), atol=atol), key
        if rule == "freeze":
            assert 0 < int(plain.memory[grid.label].is_held.sum()) < w.numel()


@pytest.mark.parametrize("rule", ["freeze", "lotion"])
def test_what_it_remembers_comes_along_to_another_device(w: torch.Tensor, rule: str) -> None:
    """Checkpoints are loaded on the CPU; ``meta`` stands for a GPU."""
    made, again = make_rule(rule), make_rule(rule)
    grid = Grid(bits=4)
    seen = made.see(w, grid, name="w")
    made.before_update(w, w.clone(), seen, grid, name="w", rate=0.1)
    again.load_state(made.state())
    elsewhere = w.to("meta")
    seen = again.see(elsewhere, grid, name="w")
    again.before_update(elsewhere, elsewhere.clone(), seen, grid, name="w", rate=0.1)
    assert seen.weight.device.type == "meta"


def test_identity(w: torch.Tensor) -> None:
    seen, grad, c, _ = gradient(w, "identity")
    assert torch.equal(seen, snap(w, GRID))
    assert torch.equal(grad, c)


def test_clipped_is_zero_outside_the_clip(w: torch.Tensor) -> None:
    seen, grad, c, _ = gradient(w, "clipped")
    x = w / per_weight(encode(w, GRID).scales)
    outside = x.abs() > 7.5
    assert outside.any()
    assert torch.equal(seen, snap(w, GRID))
    assert torch.equal(grad, torch.where(outside, torch.zeros(()), c))


@pytest.mark.parametrize("rule", ["clipped", "dampen", "freeze"])
def test_where_a_floor_makes_a_file_clamp_earlier_it_is_refused(rule: str) -> None:
    floored = {"scale_rule": "percentile", "percentile": 0.9, "scale_floor": 0.5}
    assert not make_rule(rule).supports(Grid(bits=6, **floored))
    assert make_rule(rule).supports(Grid(bits=6, **floored | {"scale_floor": 0.0}))
    assert make_rule(rule).supports(Grid(bits=6, scale_floor=0.5))


def test_clipped_floats_are_clamped_beyond_half_of_their_last_gap(w: torch.Tensor) -> None:
    """OCP's rule for scales clips up to a quarter of a binade: 6 of e2m1 reaches to 7."""
    grid = Grid("e2m1", group_size=5, scale_rule="power", scale_dtype="e8m0")
    seen, grad, c, _ = gradient(w, "clipped", grid)
    x = w / encode(w, grid).scales.float().repeat_interleave(5, 1)
    outside = x.abs() > 7
    assert outside.any()
    assert torch.equal(seen, snap(w, grid))
    assert torch.equal(grad, torch.where(outside, torch.zeros(()), c))


def test_soft_round_slope_is_its_derivative(w: torch.Tensor) -> None:
    """Against autograd through the formula, with the scale held."""
    seen, grad, c, _ = gradient(w, "soft_round")
    t = temperature(0.5)
    scales = per_weight(encode(w, GRID).scales)
    free = w.double().requires_grad_()
    x = free / scales.double()
    r = x - x.detach().floor() - 0.5
    soft = x.detach().floor() + 0.5 + torch.tanh(r / t) / (2 * math.tanh(0.5 / t))
    value = soft.clamp(-7, 7) * scales
    (c * value).sum().backward()
    inside = (x.abs() <= 7.0).detach()
    assert torch.allclose(seen.double(), value.detach(), atol=1e-5)
    assert free.grad is not None
    assert torch.allclose(grad.double()[inside], free.grad[inside], atol=1e-4)


def test_soft_round_hardens(w: torch.Tensor) -> None:
    error = [
        (make_rule("soft_round").see(w, GRID, progress=p).weight - snap(w, GRID)).abs().mean()
        for p in (0.0, 0.5, 1.0)
    ]
    assert error[0] > error[1] > error[2]
    assert temperature(0.0) == 1.0


def test_noise_is_half_a_scale_uniform_and_equal_for_equal_seeds(w: torch.Tensor) -> None:
    seen, grad, c, _ = gradient(w, "noise")
    again, *_ = gradient(w, "noise")
    assert torch.equal(seen, again)
    assert torch.equal(grad, c)
    noise = (seen - w) / per_weight(encode(w, GRID).scales)
    assert noise.abs().max() <= 0.5 + 1e-5
    many = torch.zeros(40, 1000)
    many[:, 0] = 7.0  # so that a scale is 1
    generator = torch.Generator().manual_seed(1)
    drawn = make_rule("noise").see(many, Grid(bits=4), generator=generator).weight
    noise = (drawn - many).flatten()
    assert noise.mean() == pytest.approx(0.0, abs=0.01)
    assert noise.std() == pytest.approx(1 / math.sqrt(12), rel=0.01)
    assert noise.abs().max() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1].abs() < 0.02


def test_learned_scale_has_the_lsq_gradient(w: torch.Tensor) -> None:
    """LSQ eq. 3 and its gradient scale 1/sqrt(N Qp), written out plainly."""
    grid = Grid(bits=3, scale_rule="learned", group_size=10, scale_dtype="fp32")
    seen, grad, c, scales = gradient(w, "identity", grid)
    assert scales is not None
    s = per_weight(scales.detach())
    x = w / s
    code = x.round().clamp(-3, 3)
    assert torch.equal(seen, code * s + 0.0)
    inside = x.abs() < 3
    assert torch.equal(grad, torch.where(inside, c, torch.zeros(())))
    slope = torch.where(inside, code - x, code)
    for group, columns in enumerate(((0, 10), (10, 20), (20, 25))):
        part = slice(*columns)
        n = columns[1] - columns[0]
        expected = (c * slope)[:, part].sum(1) / math.sqrt(n * 3)
        assert torch.allclose(scales.grad[:, group], expected, atol=1e-5)


def test_learned_scale_of_levels_without_a_zero(w: torch.Tensor) -> None:
    """ParetoQ's SEQ: four equal parts of [-2, 2] in units of the scale, clamped beyond them."""
    grid = Grid("int2_seq", scale_rule="learned", scale_dtype="fp32")
    seen, grad, c, scales = gradient(w, "identity", grid)
    assert scales is not None
    x = w / scales.detach()
    level = x.floor().clamp(-2, 1) + 0.5
    assert torch.equal(seen, level * scales.detach())
    inside = x.abs() < 2
    assert not inside.all()
    assert torch.equal(grad, torch.where(inside, c, torch.zeros(())))
    slope = torch.where(inside, level - x, level)
    expected = (c * slope).sum(1, keepdim=True) / math.sqrt(25 * 1.5)
    assert torch.allclose(scales.grad, expected, atol=1e-5)


@pytest.mark.parametrize("rule", sorted(set(rule_kinds()) - {"learned"}))
def test_zero_rows_pass_gradients(rule: str) -> None:
    """Zero-initialised projections must be able to leave zero."""
    w = torch.zeros(3, 25)
    seen, grad, _, _ = gradient(w, rule, Grid(bits=4, group_size=10))
    assert not seen.any()
    assert (grad != 0).all()


def test_a_strength_multiplies_what_pulls(w: torch.Tensor) -> None:
    have = {name for name, kind in rule_kinds().items() if kind.strength is not None}
    assert have == {"cage", "dampen", "freeze", "lotion"}
    for name in have - {"freeze"}:  # its own test
        pulled = []
        for strength in (0.0, 1.0, 0.25):
            master, grad, losses, _ = update(w, make_rule(name, strength), 1.0)
            pulled.append((master - w).double() + (grad - losses[-1]).double())
        assert (pulled[0] == 0).all(), name
        assert pulled[1].abs().max() > 0, name
        torch.testing.assert_close(pulled[2], pulled[1] / 4, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match=r"gradient_strength = 0.3: clipped has none; cage, dam"):
        make_rule("clipped", 0.3)


def test_what_a_rule_does_not_support_is_refused() -> None:
    relaxed = {name for name, kind in rule_kinds().items() if not kind().supports(Grid("nf4"))}
    assert relaxed == set(rule_kinds()) - {"identity", "cage"}
    plan = build_plan({"w": (6, 25)}, {"grid": Grid("nf4")}, {"*": "grid"})
    with pytest.raises(ValueError, match="gradient = soft_round: not for nf4"):
        QatSwitch(plan, "soft_round")
    with pytest.raises(ValueError, match="gradient = straight: choose from cage, clipped, dampen"):
        QatSwitch(plan, "straight")
    plan = build_plan({"w": (6, 32)}, {"grid": Grid(bits=4, rotate=8)}, {"*": "grid"})
    for rule in sorted(set(rule_kinds()) - {"learned"}):
        if rule not in {"dampen", "freeze", "lotion"}:
            QatSwitch(plan, rule)
            continue
        with pytest.raises(ValueError, match=f"gradient = {rule}: not for int4_h8"):
            QatSwitch(plan, rule)


def test_ramp_blends_masters_and_snapped(w: torch.Tensor) -> None:
    plan = build_plan({"w": (6, 25)}, {"grid": GRID}, {"*": "grid"})
    switch, masters = QatSwitch(plan), {"w": torch.nn.Parameter(w)}
    switch.refresh(masters, True, blend=0.25)
    seen = switch.weights(masters)["w"]
    assert torch.allclose(seen, 0.75 * w + 0.25 * snap(w, GRID), atol=1e-6)


def update(
    w: torch.Tensor, rule: str | GradientRule, progress: float, rate: float = 0.1, updates: int = 1
):
    """(master, gradient) when ``before_update`` has been called for the last of some updates with
    random gradients, the loss's gradients of all of them, and the seen weight of the last."""
    plan = build_plan({"w": tuple(w.shape)}, {"grid": GRID}, {"*": "grid"})
    switch, master = QatSwitch(plan, rule), torch.nn.Parameter(w.clone())
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(updates):
        switch.refresh({"w": master}, True, progress=progress)
        losses.append(torch.randn(w.shape, generator=generator))
        master.grad = losses[-1].clone()
        switch.before_update({"w": master}, {"w": rate}, progress)
    seen = switch.weights({"w": master})["w"].detach()
    return master.detach(), master.grad, losses, seen


@pytest.mark.parametrize(("progress", "strength"), [(0.3, 0.0), (0.75, 5.0), (1.0, 10.0)])
def test_cage_draws_weights_to_what_is_seen(
    w: torch.Tensor, progress: float, strength: float
) -> None:
    master, grad, (loss,), seen = update(w, "cage", progress, rate=0.01)
    expected = w.double() - 0.01 * strength * (w.double() - snap(w, GRID).double())
    assert torch.equal(seen, snap(w, GRID))
    assert torch.equal(grad, loss)
    assert torch.allclose(master.double(), expected, atol=1e-7)
    beyond, _, _, _ = update(w, "cage", 1.0, rate=5.0)
    assert torch.allclose(beyond, snap(w, GRID))


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_dampening_is_the_gradient_of_its_loss(w: torch.Tensor, progress: float) -> None:
    """By autograd, in float64: the distance of what is seen to the weights, cut off at the clip."""
    master, grad, (loss,), seen = update(w, "dampen", progress)
    scales = per_weight(encode(w, GRID).scales).double()
    free = w.double().requires_grad_()
    clipped = torch.minimum(torch.maximum(free, -7 * scales), 7 * scales)
    strength = 1e-3 * (1 - math.cos(math.pi * progress)) / 2
    (strength * (seen.double() - clipped).square().sum()).backward()
    assert free.grad is not None
    assert torch.allclose(grad.double(), loss.double() + free.grad, atol=1e-9, rtol=1e-6)
    assert torch.equal(master, w)
    assert (free.grad[w.abs() > 7 * scales] == 0).all()
    assert (w.abs() > 7 * scales).any()


def test_lotion_is_the_gradient_of_the_loss_of_random_rounding(w: torch.Tensor) -> None:
    """Half the curvature times the variance over the two neighbours, by autograd in float64."""
    master, grad, losses, seen = update(w, "lotion", 0.5, updates=3)
    assert torch.equal(seen, w)
    assert torch.equal(master, w)
    curvature = losses[0].double().square()
    for loss in losses[1:]:
        curvature = 0.95 * curvature + 0.05 * loss.double().square()
    scales = per_weight(encode(w, GRID).scales).double()
    free = w.double().requires_grad_()
    x = free / scales
    below = x.detach().floor()
    chance = x - below  # of rounding up
    mean_square = (1 - chance) * (below * scales) ** 2 + chance * ((below + 1) * scales) ** 2
    variance = mean_square - free**2
    inside = (x.abs() < 7).detach()
    assert not inside.all()
    (0.5 * curvature * variance * inside).sum().backward()
    assert free.grad is not None
    assert torch.allclose(grad.double(), losses[-1].double() + free.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.45, 0.6, 0.85, 0.9, 1.0])
def test_parq_is_torchaos(w: torch.Tensor, progress: float) -> None:
    grid = Grid(bits=4, scale_dtype="fp32")
    plan = build_plan({"w": tuple(w.shape)}, {"grid": grid}, {"*": "grid"})
    switch, master = QatSwitch(plan, "parq"), torch.nn.Parameter(w.clone())
    switch.refresh({"w": master}, True, progress=progress)
    seen = switch.weights({"w": master})["w"]
    levels = torch.arange(-7.0, 8.0) * encode(w, grid).scales
    theirs = w.clone()
    ProxPARQ(0, 900).apply_(theirs, None, levels, round(1000 * progress), dim=-1)
    assert torch.allclose(seen, theirs, atol=2e-6)
    assert torch.equal(seen, snap(w, grid)) == (progress >= 0.9)
    (3 * seen).sum().backward()
    assert torch.equal(master.grad, torch.full_like(w, 3.0))


def test_freezing_holds_what_flips_and_nothing_else(w: torch.Tensor) -> None:
    """One weight between two levels, one that goes one way, the others still."""
    grid = Grid(bits=4, group_size=10)
    plan = build_plan({"w": tuple(w.shape)}, {"grid": grid}, {"*": "grid"})
    switch, master = QatSwitch(plan, "freeze"), torch.nn.Parameter(snap(w, grid))
    for step in range(40):
        scale = encode(master.detach(), grid).scales.float()
        with torch.no_grad():
            master[0, 0] = scale[0, 0] * (1.6 if step % 2 else 1.4)
            master[1, 12] = scale[1, 1] * (step / 10 - 2)
        switch.refresh({"w": master}, True, progress=step / 40)
        seen = switch.weights({"w": master})["w"]
        assert torch.equal(seen, snap(master.detach(), grid))
    seen.sum().backward()
    assert master.grad[0, 0] == 0
    assert (master.grad[1:] == 1).all()
    assert master[0, 0] in (scale[0, 0], 2 * scale[0, 0])
    again = make_rule("freeze")
    again.load_state(switch.gradient.state())
    held = again.memory["w"].is_held
    assert held.sum() == 1
    assert held[0, 0]


def test_freezing_by_less_holds_nothing(w: torch.Tensor) -> None:
    plan = build_plan({"w": tuple(w.shape)}, {"grid": Grid(bits=4)}, {"*": "grid"})
    held = {}
    for strength in (1.0, 0.01):
        rule, master = make_rule("freeze", strength), torch.nn.Parameter(w.clone())
        switch = QatSwitch(plan, rule)
        for step in range(40):
            with torch.no_grad():
                master[0, 0] = encode(w, Grid(bits=4)).scales[0, 0] * (1.6 if step % 2 else 1.4)
            switch.refresh({"w": master}, True, progress=step / 40)
        held[strength] = int(rule.memory["w"].is_held.sum())
    assert held == {1.0: 1, 0.01: 0}


def test_a_rule_that_pulls_is_called_in_an_own_loop() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8, bias=False)
    model = QatModel(linear, Plan.for_model(linear, Grid(bits=4)), "cage").qat(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def take(pulls: bool) -> None:
        model(torch.ones(1, 8)).square().sum().backward()
        before = linear.weight.detach().clone()
        gradient = linear.weight.grad.clone()
        if pulls:
            seen = snap(before, Grid(bits=4))
            model.before_update(0.05)
            before = before + 0.5 * (seen - before)
        optimizer.step()
        assert torch.allclose(linear.weight, before - 0.05 * gradient, atol=1e-7)
        optimizer.zero_grad()

    take(pulls=True)
    take(pulls=False)
    with pytest.raises(RuntimeError, match="before_update"):
        model(torch.ones(1, 8))


def test_nothing_is_pulled_while_qat_is_off(w: torch.Tensor) -> None:
    plan = build_plan({"w": tuple(w.shape)}, {"grid": GRID}, {"*": "grid"})
    switch, master = QatSwitch(plan, "cage"), torch.nn.Parameter(w.clone())
    switch.refresh({"w": master}, False)
    master.grad = torch.ones_like(w)
    switch.before_update({"w": master}, {"w": 0.1}, 1.0)
    assert torch.equal(master, w)


@pytest.mark.parametrize("name", ["int4", "int4_g64", "nf4", "mxfp4", "nvfp4", "q4_0", "q4_1"])
def test_scales_without_codes_are_those_of_the_codes(name: str) -> None:
    grid, w = read_grid(name), torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    assert torch.equal(scales_of(w, grid), encode(w, grid).decoding_scales)
    given = scales_of(2 * w, grid)
    assert torch.equal(scales_of(w, grid, given), encode(w, grid, given).decoding_scales)
