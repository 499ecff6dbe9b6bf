"""Plans cover every tensor once and say so; what they store is what they give back."""

from __future__ import annotations

import pytest
import torch

from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan

RULES = {"*_scale": "fp32", "*.resid_mix": "fp16", "*.weight": "grid", "*": "fp32"}
SHAPE = ModelSpec(320, 3, 64, 4, 2, 2, True)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_every_tensor_is_planned_and_a_tied_one_once() -> None:
    model = GPT(SHAPE)
    plan = build_plan(shapes_of(model), {"grid": Grid(bits=6)}, RULES)
    assert {e.name for e in plan} == set(dict(model.named_parameters()))
    assert sum(e.name == "tok_emb.weight" for e in plan) == 1
    assert not any(e.name.startswith("lm_head") for e in plan)
    assert plan.entries["tok_emb.weight"].grid == Grid(bits=6)
    assert plan.entries["blocks.0.resid_mix"].dtype == "fp16"


def test_small_matrices_stay_fp16() -> None:
    plan = build_plan(
        shapes_of(GPT(SHAPE)), {"grid": Grid(bits=8)}, RULES, grid_min_elements=64 * 64 + 1
    )
    assert plan.entries["blocks.0.attn.c_q.weight"].dtype == "fp16"
    assert plan.entries["blocks.0.mlp.fc.weight"].grid is not None


def test_snapped_means_the_whole_plan() -> None:
    """Passthrough casts included: fp16 tensors go there and back."""
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    masters = dict(model.named_parameters())
    plan = build_plan(shapes_of(model), {"grid": Grid(bits=6)}, RULES)
    snapped = plan.snap(masters)
    mix = masters["blocks.1.resid_mix"]
    assert torch.equal(snapped["blocks.1.resid_mix"], mix.half().float())
    assert not torch.equal(snapped["blocks.1.resid_mix"], mix)
    decoded = {item.entry.name: item.decode() for item in plan.encode(masters)}
    for name, w in snapped.items():
        assert torch.equal(w.view(torch.int32), decoded[name].view(torch.int32)), name


def test_no_rule_puts_a_vector_on_a_grid() -> None:
    plan = build_plan(shapes_of(GPT(SHAPE)), {"grid": Grid(bits=6)}, {"*": "grid"}, 1_000)
    assert plan.entries["blocks.0.attn_scale"].dtype == "fp32"
    assert plan.entries["blocks.0.resid_mix"].dtype == "fp16"  # a matrix, and smaller than asked


def test_json_round_trip() -> None:
    grid = Grid(bits=4, group_size=48, scale_dtype="bf16")
    plan = build_plan(shapes_of(GPT(SHAPE)), {"grid": grid}, RULES)
    assert Plan.from_json(plan.as_json()) == plan


def test_mixed_precision_by_name() -> None:
    grids = {"grid": Grid(bits=6), "small": Grid(bits=5), "wide": Grid(bits=8)}
    rules = {"*_scale": "fp32", "*.mlp.*": "small", "*.attn.c_*": "grid", "tok_emb.*": "wide",
             "*": "fp16"}  # fmt: skip
    plan = build_plan(shapes_of(GPT(SHAPE)), grids, rules)
    assert plan.entries["blocks.0.mlp.fc.weight"].grid == grids["small"]
    assert plan.entries["blocks.2.attn.c_q.weight"].grid == grids["grid"]
    assert plan.entries["blocks.2.attn.proj.weight"].dtype == "fp16"
    assert plan.entries["tok_emb.weight"].grid == grids["wide"]
    assert plan.label == "int5+int6+int8"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.weight": "grid"}, "no pattern matches"),
        ({"*": "int8"}, "choose from grid"),
        ({"*": "fp16"}, "nothing lives on a grid"),
    ],
)
def test_bad_rules_are_named(rules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(shapes_of(GPT(SHAPE)), {"grid": Grid(bits=8)}, rules)
