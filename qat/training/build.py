"""From settings to the objects they describe. UserError names the setting behind a refusal."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import nn

from qat.artifact.coder import AUTO, CODERS
from qat.errors import UserError
from qat.model.registry import model_of, tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.switch import QatSwitch

if TYPE_CHECKING:
    from qat.settings.schema import (
        GridSettings,
        ModelSettings,
        PlanSettings,
        QatSettings,
        TrainSettings,
    )

GRID = "grid"  # the name in plan.rules of the grid that grid= chooses


def spec_of(m: ModelSettings) -> ModelSpec:
    return ModelSpec(**{f.name: getattr(m, f.name) for f in fields(ModelSpec)})


def _grid_of(setting: str, g: GridSettings) -> Grid:
    if g.scale_rule == "given":
        raise UserError(f"{setting}.scale_rule = given: only artifact.fill gives scales")
    try:
        return Grid(**vars(g))
    except ValueError as error:
        raise UserError(f"{setting}.{error}") from None


def plan_of(spec: ModelSpec, grid: GridSettings, plan: PlanSettings) -> Plan:
    """The plan of a model of this spec; nothing is allocated."""
    grids = {GRID: _grid_of("grid", grid)}
    grids |= {name: _grid_of(f"plan.grids.{name}", g) for name, g in plan.grids.items()}
    try:
        shapes = tensor_shapes(spec)
    except (RuntimeError, OverflowError):
        raise UserError(f"model = {spec.as_json()}: no computer holds such tensors") from None
    except ValueError as error:
        raise UserError(f"model.{error}") from None
    try:
        return build_plan(shapes, grids, plan.rules, plan.grid_min_elements)
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


def build_model(m: ModelSettings, seed: int) -> nn.Module:
    """A model initialised from its seed, or from the weights of ``model.init_from``."""
    torch.manual_seed(seed)
    try:
        model = model_of(spec_of(m))
    except RuntimeError as error:
        raise UserError(f"model.dim = {m.dim}: no memory for this model ({error})") from None
    if m.init_from is None:
        return model
    try:
        weights = torch.load(m.init_from, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds for a file that is not weights
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"model.init_from={m.init_from}: not weights of this model ({reason})"
        ) from None
    return model
