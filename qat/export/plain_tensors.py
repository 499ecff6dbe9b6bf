"""``out=FILE.safetensors``: the float32 weights of any model by their names, and as metadata what
the artifact's header says of them (values are text, as that format wants it)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from qat.artifact.container import write_whole
from qat.evaluation.open_model import OpenedModel


def tensors_as_bytes(opened: OpenedModel) -> bytes:
    """A file of the weights. ``format`` says to Hugging Face's readers whose tensors they are."""
    meta = {
        "format": "pt",
        "model": json.dumps(opened.spec.as_json(), sort_keys=True),
        "seq_len": str(opened.seq_len),
        "grid": opened.artifact.plan.label,
        "tokenizer_sha256": str(opened.artifact.meta.get("tokenizer_sha256")),
    }
    return save(opened.artifact.weights, meta)


def write_tensors(out: Path, opened: OpenedModel) -> list[str]:
    """OSError: what the disk does not take; nothing is left."""
    data = tensors_as_bytes(opened)
    write_whole(out, data)
    return [f"tensors        {len(opened.artifact.weights)} F32, the artifact's bits"]
