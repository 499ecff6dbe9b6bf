"""From an artifact file to what scoring it needs: the model's spec, tokenizer, validation text."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from qat.artifact.container import ARTIFACT, OVERSIZE_SUFFIX, Artifact, read_artifact
from qat.errors import UserError
from qat.evaluation.ranks import rank_and_ranks
from qat.evaluation.score import Scorer
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.text.shards import TokenStream
from qat.text.source import Source, from_named, from_settings
from qat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qat.settings.schema import DataSettings, EvalSettings, EvalTaskSettings

GOLF_SUFFIX = ".ptz"
GOLF_MODULE = "qat.golf.ptz_model"
OTHER_TOKENIZER = (
    "not the tokenizer this artifact was trained with; give data.val_files and data.tokenizer of "
    "the same vocabulary"
)
MAX_SEQ_LEN = 1 << 20  # of a header; a longer window is not one that anybody trained


@dataclass(frozen=True)
class OpenedModel:
    artifact: Artifact
    spec: ModelSpec
    seq_len: int


def artifact_meta(
    spec: ModelSpec, seq_len: int, tokenizer_sha256: str, source: dict[str, Any]
) -> dict[str, Any]:
    """What an artifact's header says beside the plan."""
    return {
        "model": spec.as_json(),
        "seq_len": seq_len,
        "tokenizer_sha256": tokenizer_sha256,
        "data": source,
    }


def artifact_path(s: EvalTaskSettings) -> Path:
    """The file that ``artifact=`` or ``run=`` names."""
    if s.artifact:
        return Path(s.artifact)
    assert s.run
    return artifact_in(Path(s.run), f"run={s.run}")


def artifact_in(folder: Path, typed: str) -> Path:
    """The file of a run's folder. UserError that begins with what was ``typed`` if it has none."""
    for name in (ARTIFACT, ARTIFACT + OVERSIZE_SUFFIX):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{typed}: {folder} holds no artifact; did the run finish?")


def open_model(path: Path, s: EvalTaskSettings) -> OpenedModel:
    """An artifact of this project, or the challenge's own file, whose reader is imported only then
    (and so is no part of the code that a .qat needs). UserError if it is not usable."""
    if path.suffix == GOLF_SUFFIX:
        return import_module(GOLF_MODULE).open_golf(path, s)
    return open_artifact(path)


def open_artifact(path: Path, typed: str | None = None) -> OpenedModel:
    """Read a file and check that it holds the tensors of the model it names. UserError if not, as
    of ``read_artifact``."""
    typed = typed or f"artifact={path}"
    artifact = read_artifact(path, typed)
    try:
        spec = ModelSpec.from_json(artifact.meta["model"])
        seq_len, data = artifact.meta["seq_len"], artifact.meta["data"]
        if type(seq_len) is not int or not 1 <= seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len {seq_len!r:.80}")
        if not isinstance(data, dict) or not 0.0 < data.get("val_fraction", 0.5) < 1.0:
            raise ValueError(f"data source {data!r:.80}")
        sizes = [size for size in vars(spec).values() if type(size) is int]
        if max(sizes) > max(entry.num_elements for entry in artifact.plan):
            raise ValueError("its model is larger than its tensors")
        # A million layers would be built before any was missed. A tied head may be made twice.
        expected = tensor_shapes(spec, max_tensors=2 * len(artifact.plan.entries))
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{typed}: its header names no usable model ({reason})") from None
    if expected != {entry.name: entry.shape for entry in artifact.plan}:
        raise UserError(f"{typed}: its tensors are not those of the model it names")
    return OpenedModel(artifact, spec, seq_len)


def names_text(data: DataSettings) -> bool:
    """Whether the settings say where the validation text is."""
    typed = data.val_files or data.tokenizer or data.files
    return bool(typed) or data.source != "from_artifact"


def open_validation(model: OpenedModel, data: DataSettings) -> tuple[Source, Tokenizer]:
    """Validation text from the settings if they name some, else from the artifact's header.

    UserError if it is not found, or if its tokenizer is not the artifact's.
    """
    named = model.artifact.meta["data"]
    if "val_fraction" in named:  # another split would score documents that were trained on
        data = replace(data, val_fraction=named["val_fraction"])
    if names_text(data):
        source = from_settings(data, model.spec.vocab_size)
    else:
        source = from_named(named, data, model.spec.vocab_size)
    tokenizer = Tokenizer(source.tokenizer)
    if tokenizer.sha256 != model.artifact.meta.get("tokenizer_sha256"):
        raise UserError(f"data.tokenizer={tokenizer.path}: {OTHER_TOKENIZER}")
    return source, tokenizer


def open_scorer(
    spec: ModelSpec,
    seq_len: int,
    source: Source,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    device: torch.device,
) -> Scorer:
    """A scorer on the validation text. UserError if its bytes cannot be counted; a warning if they
    are those of another text than the one tokenized."""
    stream = TokenStream(source.val_files, "data.val_files")
    stream.check_ids(tokenizer.vocab_size)
    tokenizer.check_unknown(stream)
    console = Console(stderr=True)
    scorer = Scorer(
        spec, stream, tokenizer.byte_table, seq_len, settings, device, console,
        bos_id=tokenizer.bos_id,
    )  # fmt: skip
    if rank_and_ranks()[0] == 0 and (warning := tokenizer.warning):
        print(f"warning: {warning}", file=sys.stderr)
    return scorer
