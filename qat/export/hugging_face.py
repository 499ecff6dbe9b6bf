"""``out=DIR/``: a Llama as a folder that ``transformers`` opens by ``from_pretrained``.

``model.safetensors`` holds the artifact's float32 weights by the names that this project's Llama
has from there; a tied head has no tensor of its own in either. The tokenizer is written as
``tokenizer.json`` (see ``tokenizer_json.py``), and as the SentencePiece file that it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.evaluation.open_model import OpenedModel
from qat.export.plain_tensors import tensors_as_bytes
from qat.export.tokenizer_json import tokenizer_files
from qat.model.llama import sizes_of
from qat.text.tokenizer import Tokenizer
from qat.training.llama_config import CONFIG, config_of


def write_folder(out: Path, opened: OpenedModel, tokenizer: Tokenizer) -> list[str]:
    """OSError: what the disk does not take; nothing is left. UserError: a tokenizer without BOS."""
    bos_id = tokenizer.document_start
    config = config_of(opened.spec, sizes_of(opened.spec), opened.seq_len, bos_id)
    generation = {"bos_token_id": bos_id, "eos_token_id": bos_id}
    files, fault = tokenizer_files(tokenizer, opened.seq_len)
    _write_whole_folder(
        out,
        {
            CONFIG: _as_json(config),
            "generation_config.json": _as_json(generation),
            "model.safetensors": tensors_as_bytes(opened),
            "tokenizer.model": tokenizer.path.read_bytes(),
            **{name: _as_json(content) for name, content in files.items()},
        },
    )
    said = [f"tensors        {len(opened.artifact.weights)} F32, the artifact's bits"]
    return said if fault is None else [*said, f"tokenizer      tokenizer.model alone: {fault}"]


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_whole_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """It has its name when all bytes are on the disk."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
