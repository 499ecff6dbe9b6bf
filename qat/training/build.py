"""From settings to the objects they describe. UserError names the setting behind a refusal."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qat.artifact.coder import AUTO, CODERS
from qat.errors import UserError
from qat.model.registry import model_of, tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.gradients import GradientRule, make_rule
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan, build_plan
from qat.quantize.switch import QatSwitch
from qat.settings.schema import QatSettings
from qat.training.schedule import Schedule

if TYPE_CHECKING:
    from qat.settings.schema import ModelSettings, PlanSettings, TrainSettings
    from qat.text.tokenizer import Tokenizer

# By name: a submission began from random weights, so this is no part of train_gpt.py.
INITIAL_WEIGHTS = "qat.training.initial_weights"
GRID = "grid"  # the name in plan.rules of the grid that grid= chooses


def spec_of(m: ModelSettings) -> ModelSpec:
    return ModelSpec(**{f.name: getattr(m, f.name) for f in fields(ModelSpec)})


def plan_of(spec: ModelSpec, grid: Grid, plan: PlanSettings) -> Plan:
    """The plan of a model of this spec; nothing is allocated."""
    named = {"grid": grid} | {f"plan.grids.{name}": g for name, g in plan.grids.items()}
    for setting, asked in named.items():
        if asked.scale_rule == "given":
            raise UserError(f"{setting}.scale_rule = given: only artifact.fill gives scales")
        if asked.rotate is not None:
            raise UserError(f"{setting}.rotate = {asked.rotate}: give plan.rotate, of all matrices")
    try:
        shapes = tensor_shapes(spec)
    except (RuntimeError, OverflowError, TypeError) as error:
        is_size = isinstance(error, OverflowError) or "overflow" in str(error).lower()
        if not is_size:  # the architecture's own
            raise
        raise UserError(f"model = {spec.as_json()}: no computer holds such tensors") from None
    except ValueError as error:
        raise UserError(f"model.{error}") from None
    grids = {GRID: grid} | plan.grids
    try:
        if plan.rotate is not None:
            grids = {name: replace(asked, rotate=plan.rotate) for name, asked in grids.items()}
    except ValueError as error:
        raise UserError(f"plan.{error}") from None
    try:
        return build_plan(shapes, grids, plan.rules, plan.grid_min_elements)
    except ValueError as error:
        raise UserError(str(error)) from None


def gradient_of(q: QatSettings) -> GradientRule:
    """ValueError if there is no such rule, or it has no strength."""
    return make_rule(q.gradient, q.gradient_strength) if q.enabled else make_rule("identity")


def check_gradient(plan: Plan, q: QatSettings) -> None:
    """UserError for a gradient rule that does not suit the plan's grids."""
    try:
        QatSwitch(plan, gradient_of(q))
    except ValueError as error:
        raise UserError(f"qat.{error}") from None


def check_artifact(s: TrainSettings, code_bytes: int) -> None:
    """UserError for what would keep the run's file from being written after the training."""
    coder, coders = s.artifact.coder, (*CODERS, AUTO)
    if coder not in coders:
        raise UserError(f"artifact.coder = {coder}: choose from {', '.join(coders)}")
    if code_bytes >= s.limit_bytes:
        raise UserError(
            f"limit_bytes = {s.limit_bytes}: the code alone has {code_bytes} bytes, and the limit "
            "holds both; give more"
        )


def build_model(m: ModelSettings, seed: int, tokenizer: Tokenizer | None = None) -> nn.Module:
    """A model initialised from its seed, or from the weights of ``model.init_from``, which have to
    be of this tokenizer."""
    torch.manual_seed(seed)
    try:
        model = model_of(spec_of(m))
    except RuntimeError as error:
        if "alloc" not in str(error):  # the architecture's own
            raise
        raise UserError(f"model.dim = {m.dim}: no memory for this model ({error})") from None
    if m.init_from is None:
        return model
    try:
        reader = import_module(INITIAL_WEIGHTS)
        weights = reader.initial_weights(
            Path(m.init_from), spec_of(m), model.state_dict(), tokenizer
        )
    except ValueError as error:
        raise UserError(
            f"model.init_from={m.init_from}: not weights of this model ({error})"
        ) from None
    model.load_state_dict(weights)
    return model


def build_schedule(s: TrainSettings) -> Schedule:
    starts = s.qat if s.qat.enabled else QatSettings(enabled=False)
    return Schedule(
        budget_seconds=s.budget_seconds,
        max_steps=s.max_steps,
        warmdown_steps=s.schedule.warmdown_steps,
        warmdown_fraction=s.schedule.warmdown_fraction,
        floor=s.schedule.floor,
        update_price=s.schedule.update_price,
        qat_update_price=s.schedule.qat_update_price,
        momentum_start=s.optimizer.momentum_start,
        momentum_end=s.optimizer.momentum,
        momentum_warmup_steps=s.optimizer.momentum_warmup_steps,
        start_step=starts.start_step,
        start_fraction=starts.start_fraction,
        start_lr_scale=starts.start_lr_scale,
        stop_step=s.qat.stop_step,
        ramp_steps=s.qat.ramp_steps,
    )
