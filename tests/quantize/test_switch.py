"""The switch: right weights, identity gradients, and a compiled model that never notices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.switch import QatSwitch, on_grid_share
from tests.conftest import compiles

SHAPE = ModelSpec(128, 2, 32, 4, 2, 2, True)
RULES = {"*.weight": "grid", "*": "fp16"}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def plan_on(model: GPT, grid: Grid) -> Plan:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return build_plan(shapes, {"grid": grid}, RULES)


@pytest.fixture
def plan(model: GPT) -> Plan:
    return plan_on(model, Grid(bits=4))


def test_off_gives_masters_and_on_gives_stored_weights(model: GPT, plan: Plan) -> None:
    masters, switch = dict(model.named_parameters()), QatSwitch(plan)
    off = switch.weights(masters)
    assert all(torch.equal(off[name], masters[name]) for name in masters)
    assert on_grid_share(off, masters, plan) < 0.5
    switch.refresh(masters, True)
    on, stored = switch.weights(masters), plan.snap(masters)
    assert all(torch.equal(on[name], stored[name]) for name in masters)
    assert on_grid_share(on, masters, plan) == 1.0


def test_gradient_passes_straight_to_every_master(model: GPT, plan: Plan) -> None:
    """The gradient of each master is the gradient at the snapped weights, unchanged."""
    ids = torch.randint(0, 128, (2, 16))
    switch, masters = QatSwitch(plan), dict(model.named_parameters())
    switch.refresh(masters, True)
    torch.func.functional_call(model, switch.weights(masters), (ids, ids)).backward()
    reference = GPT(SHAPE)
    reference.load_state_dict(plan.snap(masters))
    reference(ids, ids).backward()
    for name, p in reference.named_parameters():
        assert torch.equal(masters[name].grad, p.grad), name


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# torch's own compiler modules warn about themselves when first imported.
@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_switch_recompiles_nothing(model: GPT, plan: Plan) -> None:
    masters, switch = dict(model.named_parameters()), QatSwitch(plan)

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (ids, ids))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 128, (2, 16))
    compiled(switch.weights(masters), ids).backward()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for is_on in (False, True, True, False, True):
            switch.refresh(masters, is_on)
            weights = switch.weights(masters)
            value = compiled(weights, ids)
            value.backward()
            assert torch.allclose(value, loss(weights, ids))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_check_above_sees_a_switch_inside_the_graph(model: GPT, plan: Plan) -> None:
    """The planted fault: a Python flag read inside the compiled function."""
    masters, flag = dict(model.named_parameters()), {"on": False}

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        seen = {n: w * 1.0 if flag["on"] else w for n, w in weights.items()}
        return torch.func.functional_call(model, seen, (ids, ids))

    compiled = torch.compile(loss, backend="aot_eager")
    ids = torch.randint(0, 128, (2, 16))
    compiled(masters, ids)
    flag["on"] = True
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        compiled(masters, ids)
