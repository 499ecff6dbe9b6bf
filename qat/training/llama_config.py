"""A Llama's sizes as Hugging Face's config.json says them, both ways.

A Llama there is the one here (``qat/model/llama.py``): what this one has no place for is refused by
name.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from qat.model.spec import ModelSpec

CONFIG = "config.json"
MAX_HEADER_BYTES = 100_000_000  # of a .safetensors file, as its own library has it
MODEL = "model"  # of the metadata in a .safetensors file of this project: its spec
# Keys of config.json that this Llama computes with, and the only values that it knows.
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False, None),
    "mlp_bias": (False, None), "rope_scaling": (None,), "quantization_config": (None,),
}  # fmt: skip


def config_of(spec: ModelSpec, sizes: dict[str, Any], seq_len: int, bos_id: int) -> dict[str, Any]:
    """config.json of a Llama with these ``sizes_of(spec)``. A text ends where the next starts."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "intermediate_size": sizes["mlp_dim"],
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.dim // spec.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_base"]},
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "dtype": "float32",
    }


def spec_of(config: Any) -> ModelSpec:
    """The model that a config.json describes. ValueError names what this Llama has not;
    LookupError, TypeError and ArithmeticError are of what describes none."""
    if not isinstance(config, dict):
        raise ValueError("its config.json is no object")
    for key, known in ONLY.items():
        if config.get(key, known[0]) not in known:
            raise ValueError(f"its {key} is {config[key]!r:.80}, and this Llama's {known[0]}")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise TypeError("rope_parameters are no object")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"its rope_type is {rope['rope_type']!r:.80}, and this Llama's default")
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") not in (None, dim / heads):
        raise ValueError(f"its head_dim is {config['head_dim']}, and this Llama's {dim} / {heads}")
    return ModelSpec.from_json(
        {
            "name": "llama",
            "vocab_size": config["vocab_size"],
            "num_layers": config["num_hidden_layers"],
            "dim": dim,
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "mlp_mult": 1,  # mlp_dim says it
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "more": {
                "mlp_dim": config["intermediate_size"],
                "rope_base": float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
                "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            },
        }
    )


def metadata_of(path: Path) -> dict[str, str]:
    """What a .safetensors file says beside its tensors. ValueError if it is none."""
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if size > MAX_HEADER_BYTES:
            raise ValueError("not a .safetensors file")
        header = json.loads(file.read(size))
    found = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(found, dict):
        raise ValueError("not a .safetensors file")
    return found


def spec_at(path: Path) -> ModelSpec | None:
    """What a folder of Hugging Face, or a .safetensors file of this project, says of its model;
    None of any other file. ValueError: what this program has no model for. OSError."""
    try:
        if path.is_dir():
            return spec_of(json.loads((path / CONFIG).read_text("utf-8")))
        if path.suffix == ".safetensors" and path.is_file():
            meta = metadata_of(path)
            return ModelSpec.from_json(json.loads(meta[MODEL])) if MODEL in meta else None
    except (LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"it describes no model ({type(error).__name__}: {error})") from None
    return None
