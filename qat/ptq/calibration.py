"""Text to calibrate on: the training split, what the model writes itself, or random tokens.

Text of the model's own is as good as training text for GPTQ (and may be used where training data
may not); random tokens are the control.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.model.registry import empty_model, last_logits
from qat.model.spec import ModelSpec
from qat.ptq.layer_inputs import LayerInputs
from qat.text.batches import BatchShape, micro_batch
from qat.text.shards import TokenStream

Batch = tuple[Tensor, Tensor]  # ids and targets (B, T)


def calibration_batches(
    stream: TokenStream, num_tokens: int, batch_tokens: int, seq_len: int
) -> list[Batch]:
    """At least ``num_tokens`` tokens (at least one batch), spread evenly over the training text."""
    shape = BatchShape(max(batch_tokens // seq_len, 1) * seq_len, seq_len)
    count = -(-num_tokens // shape.batch_tokens)
    steps = max(len(stream) // (shape.batch_tokens + 1), 1)
    return [micro_batch(stream, shape, i * steps // count, 0, 0) for i in range(count)]


SEQUENCES, MAX_TOKENS = 128, 512  # of a sequence; more cost time and change little
SELF_TOKENS = 64  # of a sequence that the model writes: it takes a forward pass per token
BATCH_SEQUENCES = 16


def training_sequences(stream: TokenStream, seq_len: int) -> Tensor:
    """(SEQUENCES, seq_len) ids, spread evenly over the stream (which wraps around)."""
    starts = [i * len(stream) // SEQUENCES for i in range(SEQUENCES)]
    return torch.stack([torch.from_numpy(stream.take(start, seq_len)) for start in starts])


def random_sequences(spec: ModelSpec, seq_len: int, seed: int) -> Tensor:
    """(SEQUENCES, seq_len) ids, each as likely as the others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(spec.vocab_size, (SEQUENCES, seq_len), generator=generator)


@torch.inference_mode()
def written_sequences(
    spec: ModelSpec, weights: Mapping[str, Tensor], bos_id: int, seed: int
) -> Tensor:
    """(SEQUENCES, SELF_TOKENS) ids that the model draws from its own predictions, from BOS on."""
    model = empty_model(spec)
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.full((SEQUENCES, 1), bos_id, device=device)
    while ids.size(1) < SELF_TOKENS:
        logits_BV = last_logits(model, weights, ids, 1)[:, -1]
        drawn = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, drawn), dim=1)
    return ids.cpu()


def read_inputs(spec: ModelSpec, weights: Mapping[str, Tensor], sequences: Tensor) -> LayerInputs:
    """What every matrix of the float model reads of these (S, T) ids."""
    device = next(iter(weights.values())).device
    batches = (ids_BT.to(device) for ids_BT in sequences.split(BATCH_SEQUENCES))
    return LayerInputs.of_spec(spec, weights, "fp32").see_all(batches)
