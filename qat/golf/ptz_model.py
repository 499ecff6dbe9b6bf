"""From the challenge's ``final_model.int8.ptz`` to what scoring it needs.

The file names no model, no sequence length and no tokenizer. The model is read off the names and
shapes of its tensors; the other two are settings. Constants without a tensor (RoPE base 10,000,
softcap 30) are taken to be the baseline's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qat.artifact.container import Artifact
from qat.errors import UserError
from qat.evaluation.open_model import OpenedModel, artifact_meta
from qat.golf.ptz_file import read_golf_file
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.plan import Plan
from qat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings

QUERY_GAIN = re.compile(r"blocks\.\d+\.attn\.q_gain")


def open_golf(path: Path, s: EvalTaskSettings) -> OpenedModel:
    """Read a .ptz file and find out its model. UserError if it is no model of the challenge, or if
    ``data.tokenizer`` has another vocabulary."""
    file = read_golf_file(path)
    spec = spec_from(file.plan, path)
    assert s.eval.seq_len is not None  # asked for by the checks of the settings
    assert s.data.tokenizer is not None
    tokenizer = Tokenizer(Path(s.data.tokenizer))
    if tokenizer.vocab_size != spec.vocab_size:
        raise UserError(
            f"data.tokenizer={s.data.tokenizer}: it has {tokenizer.vocab_size} pieces, the model "
            f"in {path} {spec.vocab_size} embeddings; give the tokenizer it was trained with"
        )
    # What the header of an artifact of this project says, from the settings.
    meta = artifact_meta(spec, s.eval.seq_len, tokenizer.sha256, {"name": "shards"})
    # Its codes and sections are not those of an artifact; scoring needs neither.
    artifact = Artifact(meta, file.plan, file.weights, [], [], file.num_bytes)
    return OpenedModel(artifact, spec, s.eval.seq_len)


def spec_from(plan: Plan, path: Path) -> ModelSpec:
    """The model whose tensors these are: ``q_gain`` has an entry per head, ``c_k`` a row per
    dimension of the key/value heads, ``mlp.fc`` a row per hidden unit. UserError if none fits."""
    found = {entry.name: entry.shape for entry in plan}
    try:
        vocab_size, dim = found["tok_emb.weight"]
        (num_heads,) = found["blocks.0.attn.q_gain"]
        kv_dim, _ = found["blocks.0.attn.c_k.weight"]
        hidden, _ = found["blocks.0.mlp.fc.weight"]
        if min(vocab_size, dim, num_heads, kv_dim, hidden) < 1 or dim % (2 * num_heads):
            raise ValueError(f"{num_heads} heads cannot share a width of {dim}")
        head_dim = dim // num_heads
        if kv_dim % head_dim or num_heads % (kv_dim // head_dim):
            raise ValueError(f"{kv_dim} key rows are no heads of {head_dim} for {num_heads} heads")
        if hidden % dim:
            raise ValueError(f"an MLP of {hidden} is no multiple of the width {dim}")
        spec = ModelSpec(
            vocab_size=vocab_size,
            num_layers=sum(QUERY_GAIN.fullmatch(name) is not None for name in found),
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=kv_dim // head_dim,
            mlp_mult=hidden // dim,
            tie_embeddings="lm_head.weight" not in found,
        )
        expected = tensor_shapes(spec)
    except KeyError as error:
        raise UserError(f"artifact={path}: not a model of the challenge: no {error}") from None
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"artifact={path}: not a model of the challenge: {reason}") from None
    if found != expected:
        odd = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise UserError(
            f"artifact={path}: not a model of the challenge: tensor {odd[:80]!r} is missing, too "
            f"many or of the wrong shape for {spec.num_layers} layers of width {dim}"
        )
    return spec
