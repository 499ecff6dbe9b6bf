"""From settings to the objects they describe. UserError names the setting behind a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qat.artifact.coder import AUTO, CODERS
from qat.errors import UserError
from qat.model.gpt import GPT, GPTShape, tensor_shapes
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.switch import QatSwitch

if TYPE_CHECKING:
    from qat.settings.schema import ModelSettings, PlanSettings, QatSettings, TrainSettings

GRID = "grid"  # the name in plan.rules of the grid that grid= chooses


def shape_of(m: ModelSettings) -> GPTShape:
    return GPTShape(
        m.vocab_size, m.num_layers, m.dim, m.num_heads, m.num_kv_heads, m.mlp_mult, m.tie_embeddings
    )


def plan_of(shape: GPTShape, grid: Grid, plan: PlanSettings) -> Plan:
    """The plan of a model of this shape; nothing is allocated."""
    named = {"grid": grid} | {f"plan.grids.{name}": g for name, g in plan.grids.items()}
    for setting, asked in named.items():
        if asked.scale_rule == "given":
            raise UserError(f"{setting}.scale_rule = given: only artifact.fill gives scales")
    try:
        shapes = tensor_shapes(shape)
    except (RuntimeError, OverflowError):
        raise UserError(f"model = {shape.as_dict()}: no computer holds such tensors") from None
    try:
        return build_plan(shapes, {GRID: grid} | plan.grids, plan.rules, plan.grid_min_elements)
    except ValueError as error:
        raise UserError(str(error)) from None


def switch_of(plan: Plan, q: QatSettings, seed: int, fused: bool = False) -> QatSwitch:
    try:
        return QatSwitch(plan, q.gradient if q.enabled else "identity", seed, fused)
    except ValueError as error:
        raise UserError(f"qat.{error}") from None


def check_coder(s: TrainSettings) -> None:
    coders = (*CODERS, AUTO)
    if s.artifact.coder not in coders:
        raise UserError(f"artifact.coder = {s.artifact.coder}: choose from {', '.join(coders)}")


def build_gpt(m: ModelSettings, seed: int) -> GPT:
    """A model initialised from its seed, or from the weights of ``model.init_from``."""
    torch.manual_seed(seed)
    try:
        gpt = GPT(shape_of(m))
    except RuntimeError as error:
        raise UserError(f"model.dim = {m.dim}: no memory for this model ({error})") from None
    if m.init_from is None:
        return gpt
    try:
        weights = torch.load(m.init_from, map_location="cpu", weights_only=True)
        gpt.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds for a file that is not weights
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"model.init_from={m.init_from}: not weights of this model ({reason})"
        ) from None
    return gpt
