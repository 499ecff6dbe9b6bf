"""Plans cover every tensor once and say so; what they store is what they give back."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm((2, 8))  # a matrix, and never on a grid


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mix = nn.Parameter(torch.zeros(2, 8))  # of no layer
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed.weight


GRID, OTHER, THIRD = Grid(bits=6), Grid(bits=5), Grid("nf4", group_size=4)


def on_grid(plan: Plan) -> dict[str, Grid | None]:
    return {entry.name: entry.grid for entry in plan.on_grid}


MATRICES = [
    "embed.weight",
    *(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn", "mlp.0", "mlp.2")),
]


def test_for_model_takes_matrices_of_layers_and_a_tied_one_once() -> None:
    model = Tied()
    plan = Plan.for_model(model, GRID)
    assert [entry.name for entry in plan] == [name for name, _ in model.named_parameters()]
    assert on_grid(plan) == dict.fromkeys(MATRICES, GRID)
    assert {entry.dtype for entry in plan} == {"fp32"}
    assert Plan.from_json(plan.as_json()) == plan
    halves = Plan.for_model(model, GRID, dtype="bf16")
    assert {entry.dtype for entry in halves if entry.grid is None} == {"bf16"}
    assert Plan.from_json(halves.as_json()) == halves


def test_for_model_first_rule_counts_and_keep_wins() -> None:
    rules = {"*.mlp.0*": OTHER, "blocks.1": THIRD, "mix": OTHER}
    expected = dict.fromkeys(MATRICES, GRID) | {"mix": OTHER}
    expected |= {f"blocks.{i}.mlp.0.weight": OTHER for i in (0, 1)}
    expected |= {"blocks.1.attn.weight": THIRD, "blocks.1.mlp.2.weight": THIRD}
    assert on_grid(Plan.for_model(Tied(), GRID, rules=rules)) == expected
    kept = Plan.for_model(Tied(), GRID, keep=["lm_head*", "blocks.1.mlp"], rules=rules)
    for name in ("embed.weight", "blocks.1.mlp.0.weight", "blocks.1.mlp.2.weight"):
        del expected[name]
    assert on_grid(kept) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": ["head*"]}, r"keep: 'head\*' matches no parameter or module"),
        ({"keep": ["*"]}, "nothing of the model lives on a grid"),
        ({"rules": {"*.wq.*": OTHER}}, r"rules: '\*\.wq\.\*' matches no matrix"),
        ({"rules": {"*.norm": OTHER}}, "rules: .* matches no matrix"),
        ({"rules": {"*bias": OTHER}}, "rules: .* matches no matrix"),
        ({"dtype": "int8"}, "dtype = int8: choose from fp32, bf16, fp16"),
    ],
)
def test_for_model_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.for_model(Tied(), GRID, **arguments)


globs = st.sampled_from(
    ("*", "embed*", "lm_head", "blocks.*", "blocks.0", "*.mlp", "*.attn.weight", "mix", "*norm*")
)


@given(st.lists(globs, max_size=3), st.dictionaries(globs, st.sampled_from((OTHER, THIRD))))
@settings(max_examples=100, deadline=None)
def test_for_model_says_what_its_globs_say(keep: list[str], rules: dict[str, Grid]) -> None:
    """Written out per parameter: keep, else the first rule, else by type."""
    model = Tied()

    def is_in(name: str, glob: str) -> bool:
        aliases = [name, "lm_head.weight"] if name == "embed.weight" else [name]
        parents = [a.rsplit(".", depth)[0] for a in aliases for depth in range(a.count(".") + 1)]
        return any(fnmatchcase(known, glob) for known in parents)

    expected = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and ".norm." not in name
        by_rule = next((grid for glob, grid in rules.items() if is_in(name, glob)), None)
        is_kept = not is_matrix or any(is_in(name, glob) for glob in keep)
        expected[name] = None if is_kept else by_rule or (GRID if name != "mix" else None)
    if "*norm*" in rules or not any(expected.values()):
        with pytest.raises(ValueError, match=r"matches no matrix|nothing of the model"):
            Plan.for_model(model, GRID, keep, rules)
        return
    assert {e.name: e.grid for e in Plan.for_model(model, GRID, keep, rules)} == expected
