"""``eval.py task=sample``: text written by an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.evaluation.open_model import artifact_path, open_model, open_validation
from qat.evaluation.sample import sample

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings


def run(s: EvalTaskSettings) -> int:
    model = open_model(artifact_path(s), s)
    _, tokenizer = open_validation(model, s.data)
    ids = sample(
        model.shape,
        model.artifact.weights,
        tokenizer.encode_document(s.prompt),
        s.sample.max_tokens,
        s.eval.seq_len or model.seq_len,
        s.sample.temperature,
        s.seed,
    )
    print(tokenizer.decode(ids))
    return 0
