"""From settings to the objects they describe. UserError names the setting behind a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qat.artifact.coder import CODERS
from qat.errors import UserError
from qat.language.gpt import GPT, GPTShape
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan

if TYPE_CHECKING:
    from qat.settings.schema import GridSettings, ModelSettings, PlanSettings, TrainSettings


def shape_of(m: ModelSettings) -> GPTShape:
    return GPTShape(
        m.vocab_size, m.num_layers, m.dim, m.num_heads, m.num_kv_heads, m.mlp_mult, m.tie_embeddings
    )


def plan_of(shape: GPTShape, grid: GridSettings, plan: PlanSettings) -> Plan:
    """The plan of a model of this shape; nothing is allocated."""
    try:
        the_grid = Grid(**vars(grid))
    except ValueError as error:
        raise UserError(f"grid.{error}") from None
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(shape).named_parameters()}
    try:
        return build_plan(shapes, the_grid, plan.rules, plan.grid_min_elements)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_coder(s: TrainSettings) -> None:
    if s.artifact.coder not in CODERS:
        raise UserError(f"artifact.coder = {s.artifact.coder}: choose from {', '.join(CODERS)}")


def build_gpt(m: ModelSettings, seed: int) -> GPT:
    """A model initialised from its seed, or from the weights of ``model.init_from``."""
    torch.manual_seed(seed)
    gpt = GPT(shape_of(m))
    if m.init_from is None:
        return gpt
    try:
        weights = torch.load(m.init_from, map_location="cpu", weights_only=True)
        gpt.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds for a file that is not weights
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.init_from={m.init_from}: not weights of this model ({reason})"
        ) from None
    return gpt
