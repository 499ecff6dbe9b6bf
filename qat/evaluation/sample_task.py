"""``eval.py task=sample``: text written by an artifact, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.evaluation.open_model import artifact_path, open_model, open_validation
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings


@torch.inference_mode()
def sample(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    prompt_ids: list[int],
    max_tokens: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Prompt and continuation, up to ``max_tokens`` new tokens or the next document, which starts
    like the prompt.

    ``temperature`` 0 takes the likeliest token. Only the last ``seq_len`` tokens are looked at.
    """
    model = empty_model(spec)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_tokens):
        window = torch.tensor([ids[-seq_len:]])
        logits_V = torch.func.functional_call(model, dict(weights), (window,))[0, -1]
        if temperature == 0.0:
            token = int(logits_V.argmax())
        else:
            probabilities = torch.softmax(logits_V / temperature, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == prompt_ids[0]:
            break
        ids.append(token)
    return ids


def run(s: EvalTaskSettings, budget: Budget) -> int:
    model = open_model(artifact_path(s), s)
    _, tokenizer = open_validation(model, s.data)
    ids = sample(
        model.spec,
        model.artifact.weights,
        tokenizer.encode_document(s.prompt),
        s.sample.max_tokens,
        s.eval.seq_len or model.seq_len,
        s.sample.temperature,
        s.seed,
    )
    print(tokenizer.decode(ids))
    return 0
