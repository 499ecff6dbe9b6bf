"""The model that ``qat.distill.teacher`` names: a .qat file, or a run's folder or name."""

from __future__ import annotations

from pathlib import Path

from qat.errors import UserError
from qat.evaluation.open_model import artifact_in, open_artifact
from qat.settings.checks import find_run
from qat.settings.schema import TrainSettings
from qat.training.distill import Teacher

SETTING = "qat.distill.teacher"


def open_teacher(s: TrainSettings, tokenizer_sha256: str | None = None) -> Teacher | None:
    """None where none is named, or QAT is off. UserError if it is not usable, or reads other pieces
    of text than the tokenizer of this hash gives."""
    named = s.qat.distill.teacher
    if named is None or not s.qat.enabled:
        return None
    path, typed = Path(named), f"{SETTING}={named}"
    if not path.is_file():
        path = artifact_in(find_run(SETTING, named, s.runs_dir), typed)
    opened = open_artifact(path, typed)
    if tokenizer_sha256 not in (None, opened.artifact.meta.get("tokenizer_sha256")):
        raise UserError(f"{typed}: it was trained with another tokenizer than this run's")
    return Teacher(opened.spec, opened.artifact.weights)
