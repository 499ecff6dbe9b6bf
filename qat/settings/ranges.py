"""What settings may hold beside each other; what one may hold by itself stands in the schema."""

from __future__ import annotations

from qat.errors import UserError
from qat.settings.schema import (
    EvalSettings,
    ModelSettings,
    TrainSettings,
    require,
)

MAX_VOCAB_SIZE = 65_536  # token ids are stored as uint16


def check_to_bytes(s: TrainSettings) -> None:
    """Training to a number of bytes decides alone how the last weights are stored."""
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


def check_vocab_size(vocab_size: int) -> None:
    require(
        1 < vocab_size <= MAX_VOCAB_SIZE,
        "model.vocab_size",
        vocab_size,
        f"give 2 to {MAX_VOCAB_SIZE}; shards store tokens in 16 bits",
    )


def check_eval(e: EvalSettings, trained_seq_len: int | None = None) -> None:
    seq_len = e.seq_len or trained_seq_len
    if e.stride is not None and seq_len is not None and e.stride > seq_len:
        raise UserError(
            f"eval.stride = {e.stride}: must be at most eval.seq_len = {seq_len}, or tokens "
            "between windows would not be scored"
        )


def check_model(m: ModelSettings) -> None:
    for name in ("num_layers", "dim", "num_heads", "num_kv_heads", "mlp_mult"):
        require(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "give 1 or more")
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
