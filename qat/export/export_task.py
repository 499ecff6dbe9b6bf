"""``eval.py task=export out=...``: an artifact as a file that other programs open.

What kind is in its name: ``out=FILE.gguf`` (llama.cpp), ``out=DIR/`` (Hugging Face),
``out=FILE.safetensors`` (plain tensors), ``out=FILE.ptz`` (the challenge's). All hold the weights
of the artifact, bit for bit, and nothing has the name before it is whole.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qat.errors import UserError
from qat.evaluation.open_model import (
    OTHER_TOKENIZER,
    OpenedModel,
    artifact_path,
    open_artifact,
    open_validation,
)
from qat.export.gguf_file import write_gguf
from qat.export.golf_file import write_golf
from qat.export.hugging_face import write_folder
from qat.export.plain_tensors import write_tensors
from qat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import DataSettings, EvalTaskSettings

NEEDS = {".gguf": "gguf", ".safetensors": "safetensors", "": "safetensors"}  # packages


def run(s: EvalTaskSettings, budget: Budget) -> int:
    assert s.out is not None  # asked for by the checks of the settings
    path, out = artifact_path(s), Path(s.out)
    kind = "" if s.out.endswith("/") else out.suffix
    if os.path.lexists(out):
        raise UserError(f"out={s.out}: it is there already; give another name")
    if not out.parent.is_dir():
        raise UserError(f"out={s.out}: No such file or directory: {out.parent}")
    if kind in NEEDS and not find_spec(NEEDS[kind]):
        raise UserError(f"out={s.out}: needs {NEEDS[kind]}: pip install -e '.[export]'")
    opened = open_artifact(path)
    try:
        said = _write(kind, out, opened, s)
    except ValueError as error:
        file = f"a {kind} file" if kind else "a folder of Hugging Face's"
        raise UserError(f"artifact={path}: cannot become {file}: {error}") from None
    except OSError as error:
        raise UserError(f"out={s.out}: {error.strerror or error}") from None
    print("\n".join([f"file           {out}", *said]))
    return 0


def _write(kind: str, out: Path, opened: OpenedModel, s: EvalTaskSettings) -> list[str]:
    """Lines on what was written. ValueError: why a file of this kind cannot hold it."""
    if kind == ".ptz":
        return write_golf(out, opened)
    if kind == ".safetensors":
        return write_tensors(out, opened)
    if opened.spec.name != "llama":
        reader = "llama.cpp" if kind else "Hugging Face"
        raise ValueError(
            f"its model is a {opened.spec.name}, of which {reader} knows nothing; "
            "give out=FILE.safetensors"
        )
    return (write_gguf if kind else write_folder)(out, opened, _tokenizer(opened, s.data))


def _tokenizer(opened: OpenedModel, data: DataSettings) -> Tokenizer:
    """That of the artifact. UserError if it is not found."""
    if not data.tokenizer:
        return open_validation(opened, data)[1]
    tokenizer = Tokenizer(Path(data.tokenizer))
    if tokenizer.sha256 != opened.artifact.meta.get("tokenizer_sha256"):
        raise UserError(f"data.tokenizer={data.tokenizer}: {OTHER_TOKENIZER}")
    return tokenizer
