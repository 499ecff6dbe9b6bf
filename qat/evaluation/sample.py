"""Text written by a model, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.language.gpt import GPT, GPTShape
from qat.language.tokenizer import BOS_ID


@torch.inference_mode()
def sample(
    shape: GPTShape,
    weights: Mapping[str, Tensor],
    prompt_ids: list[int],
    max_tokens: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Prompt and continuation, up to ``max_tokens`` new tokens or the end of the document.

    ``temperature`` 0 takes the likeliest token. Only the last ``seq_len`` tokens are looked at.
    """
    with torch.device("meta"):
        gpt = GPT(shape)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_tokens):
        window = torch.tensor([ids[-seq_len:]])
        logits_V = torch.func.functional_call(gpt, dict(weights), (window,))[0, -1]
        if temperature == 0.0:
            token = int(logits_V.argmax())
        else:
            probabilities = torch.softmax(logits_V / temperature, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == BOS_ID:
            break
        ids.append(token)
    return ids
