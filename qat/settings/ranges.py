"""What one group of settings may hold, whatever the others say. A refusal names the setting."""

from __future__ import annotations

import math
from importlib.util import find_spec

from qat.errors import UserError
from qat.model.spec import architectures
from qat.settings.schema import (
    ArtifactSettings,
    AveragingSettings,
    ConstraintSettings,
    EvalSettings,
    FullEvalSettings,
    LoggerSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)

MAX_VOCAB_SIZE = 65_536  # token ids are stored as uint16
MAX_TAG_LENGTH = 64  # of W&B
EVAL_PARTS = ("reliability", "damage", "layers", "pairs", "cost")


def require(condition: bool, setting: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{setting} = {'null' if value is None else value}: {remedy}")


def one_of(setting: str, value: str, options: tuple[str, ...]) -> None:
    require(value in options, setting, value, f"choose from {', '.join(options)}")


def at_least(setting: str, value: float | None, lowest: int) -> None:
    require(value is None or value >= lowest, setting, value, f"give {lowest} or more")


def check_logger(s: LoggerSettings) -> None:
    one_of("logger.name", s.name, ("csv", "wandb"))
    is_there = s.name != "wandb" or find_spec("wandb") is not None
    require(is_there, "logger.name", s.name, "it is not installed; pip install 'qat[wandb]'")
    at_least("logger.every_steps", s.every_steps, 1)
    for tag in s.tags:
        remedy = f"give tags of 1 to {MAX_TAG_LENGTH} characters"
        require(1 <= len(tag) <= MAX_TAG_LENGTH, "logger.tags", tag, remedy)


def check_optimizer(o: OptimizerSettings) -> None:
    at_least("optimizer.momentum_warmup_steps", o.momentum_warmup_steps, 0)
    one_of("optimizer.newton_schulz_dtype", o.newton_schulz_dtype, ("bf16", "fp32"))
    one_of("optimizer.name", o.name, ("muon", "normuon", "adamw"))
    for name, value in vars(o).items():
        if isinstance(value, str):
            continue
        if name.endswith("_lr"):
            require(0 <= value < math.inf, f"optimizer.{name}", value, "give 0 or more")
        elif name != "momentum_warmup_steps":
            require(0 <= value < 1, f"optimizer.{name}", value, "give 0 or more, below 1")


def check_schedule(s: ScheduleSettings) -> None:
    at_least("schedule.warmup_steps", s.warmup_steps, 0)
    at_least("schedule.warmdown_steps", s.warmdown_steps, 0)
    require(0.0 <= s.floor < 1.0, "schedule.floor", s.floor, "give 0 or more, below 1")
    if s.warmdown_fraction is None:
        return
    fraction = f"schedule.warmdown_fraction = {s.warmdown_fraction}"
    if not 0.0 < s.warmdown_fraction < math.inf:
        raise UserError(f"{fraction}: give more than 0")
    if s.warmdown_steps is not None:
        raise UserError(
            f"{fraction} and schedule.warmdown_steps = {s.warmdown_steps}: two warmdowns; add "
            "schedule.warmdown_steps=null"
        )


def check_artifact(a: ArtifactSettings) -> None:
    at_least("artifact.sensitivity_tokens", a.sensitivity_tokens, 1)
    one_of("artifact.method", a.method, ("round", "gptq"))
    price = a.gptq_bit_price
    require(0 <= price < math.inf, "artifact.gptq_bit_price", price, "give 0 or more")
    is_read = price == 0.0 or a.method == "gptq"
    require(is_read, "artifact.gptq_bit_price", price, "only with artifact.method=gptq")


def check_to_bytes(s: TrainSettings) -> None:
    """Training to a number of bytes decides alone how the last weights are stored."""
    price = s.qat.bit_price
    require(price is None or 0 <= price < math.inf, "qat.bit_price", price, "give 0 or more")
    if not (s.qat.enabled and s.qat.to_bytes):
        return
    learned = "takes learned scales of rows and columns; give qat=rd"
    one_of_learned = s.grid.scale_rule == "learned" and s.grid.column_scales
    require(one_of_learned, "qat.to_bytes", "true", learned)
    late = (
        "qat.to_bytes = true learns first what matters to the loss; start after an update or more"
    )
    for start in ("start_step", "start_fraction"):
        value = getattr(s.qat, start)
        require(value is None or value > 0, f"qat.{start}", value, late)
    scale = s.qat.start_lr_scale
    require(scale is None or scale < 1, "qat.start_lr_scale", scale, late)
    for setting, value, allowed in (
        ("artifact.fill", s.artifact.fill, False),
        ("artifact.method", s.artifact.method, "round"),
        ("averaging", s.averaging.kind, "none"),
        ("qat.stop_step", s.qat.stop_step, None),
    ):
        require(value == allowed, setting, value, "not with qat.to_bytes = true; drop it")


def check_averaging(a: AveragingSettings) -> None:
    one_of("averaging.kind", a.kind, ("none", "ema", "swa"))
    one_of("averaging.of", a.of, ("masters", "snapped"))
    require(0.0 <= a.decay < 1.0, "averaging.decay", a.decay, "give 0 or more, below 1")
    at_least("averaging.every_steps", a.every_steps, 1)
    start = a.start_fraction
    require(0.0 <= start < 1.0, "averaging.start_fraction", start, "give 0 or more, below 1")


def check_vocab_size(vocab_size: int) -> None:
    require(
        1 < vocab_size <= MAX_VOCAB_SIZE,
        "model.vocab_size",
        vocab_size,
        f"give 2 to {MAX_VOCAB_SIZE}; shards store tokens in 16 bits",
    )


def check_eval(e: EvalSettings, trained_seq_len: int | None = None) -> None:
    one_of("eval.precision", e.precision, ("fp32", "bf16"))
    at_least("eval.batch_tokens", e.batch_tokens, 1)
    at_least("eval.seq_len", e.seq_len, 1)
    at_least("eval.stride", e.stride, 1)
    seq_len = e.seq_len or trained_seq_len
    if e.stride is not None and seq_len is not None and e.stride > seq_len:
        raise UserError(
            f"eval.stride = {e.stride}: must be at most eval.seq_len = {seq_len}, or tokens "
            "between windows would not be scored"
        )


def check_parts(e: FullEvalSettings) -> None:
    for part in e.parts:
        one_of("eval.parts", part, EVAL_PARTS)
    for name in ("layers_tokens", "num_bins", "resamples", "repeats"):
        at_least(f"eval.{name}", getattr(e, name), 1)
    is_used = e.pairs_file is None or "pairs" in e.parts
    require(is_used, "eval.pairs_file", e.pairs_file, "add eval.parts='[pairs]' or eval=full")


def check_constraints(c: ConstraintSettings) -> None:
    typed = {name: limit for name, limit in vars(c).items() if limit is not None}
    needed = "give the most of something, constraints='{latency_ms: 10, artifact_bytes: 16000000}'"
    require(bool(typed), "constraints", None, needed)
    for name, limit in typed.items():
        require(0 < limit < math.inf, f"constraints.{name}", limit, "give a number above 0")


def check_model(m: ModelSettings) -> None:
    one_of("model.name", m.name, architectures())
    for name in ("num_layers", "dim", "num_heads", "num_kv_heads", "mlp_mult"):
        at_least(f"model.{name}", getattr(m, name), 1)
    require(
        m.dim % m.num_heads == 0,
        "model.dim",
        m.dim,
        f"must be a multiple of model.num_heads = {m.num_heads}",
    )
    require(
        m.dim // m.num_heads % 2 == 0,
        "model.dim",
        m.dim,
        f"gives odd heads of {m.dim // m.num_heads}; rotary embedding needs an even size",
    )
    require(
        m.num_heads % m.num_kv_heads == 0,
        "model.num_kv_heads",
        m.num_kv_heads,
        f"must divide model.num_heads = {m.num_heads}",
    )
    check_vocab_size(m.vocab_size)
