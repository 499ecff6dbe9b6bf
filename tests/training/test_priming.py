"""What priming disturbs is as it was before it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from qat.quantize import gradients
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.quantize.switch import QatSwitch
from qat.training.loop import _Snapshot
from tests.conftest import code_in


def test_a_gradient_rule_forgets_the_priming_steps(plug_in) -> None:
    plug_in(gradients, gradients.rule_kinds, "hold", code_in("add_a_gradient.md")[0])
    masters = {"w": torch.randn(4, 8)}
    switch = QatSwitch(build_plan({"w": (4, 8)}, {"grid": Grid(bits=4)}, {"*": "grid"}), "hold")
    switch.refresh(masters, True)
    before = {name: tensor.clone() for name, tensor in switch.gradient.state().items()}
    assert set(before) == {"codes w", "flips w"}
    loop = SimpleNamespace(masters=masters, all_optimizers=[], switch=switch)
    snapshot = _Snapshot(loop)  # type: ignore[arg-type]
    masters["w"].neg_()
    switch.refresh(masters, True)
    assert switch.gradient.state()["flips w"].any()
    snapshot.restore()
    after = switch.gradient.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
