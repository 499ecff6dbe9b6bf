"""The engine against the simplest loop: torch's attention and loss, Muon matrix by matrix."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.text.batches import BatchShape, micro_batch
from qat.text.shards import TokenStream
from tests.conftest import GOLF

STEPS = 20


class PlainGPT(GPT):
    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        assert targets_BT is not None
        logits_BTV = super().forward(ids_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def torchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def orthogonalized(matrix: Tensor) -> Tensor:
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def plain_losses() -> list[float]:
    torch.manual_seed(1337)
    gpt = PlainGPT(ModelSpec(512, 2, 64, 4, 2, 2, True))
    for block in gpt.blocks:
        block.attn.attend = torchs_attention
    matrices = [p for name, p in gpt.named_parameters() if "blocks" in name and "weight" in name]
    others = [p for p in gpt.parameters() if all(p is not m for m in matrices)]
    embedding = gpt.tok_emb.weight
    vectors = [p for p in others if p is not embedding]
    adam = torch.optim.Adam(
        [{"params": [embedding], "lr": 0.05}, {"params": vectors, "lr": 0.04}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    buffers = [torch.zeros_like(m) for m in matrices]
    stream = TokenStream(sorted(GOLF.glob("fineweb_train_*.bin")), "test")
    losses = []
    for step in range(STEPS):
        loss = gpt(*micro_batch(stream, BatchShape(1024, 64), step, 0, 0))
        loss.backward()
        losses.append(loss.item())
        momentum = 0.85 + 0.1 * step / 500
        with torch.no_grad():
            for matrix, buffer in zip(matrices, buffers, strict=True):
                assert matrix.grad is not None
                buffer.mul_(momentum).add_(matrix.grad, alpha=1 - momentum)
                direction = (1 - momentum) * matrix.grad + momentum * buffer
                scale = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
                matrix -= 0.04 * scale * orthogonalized(direction)
        adam.step()
        gpt.zero_grad()
    return losses


def test_the_engine_follows_the_plain_loop(train) -> None:
    """Same sums, other order: within 1e-5 of it for 20 steps in float32."""
    done = train(
        "data.files=null", f"data.train_files={GOLF}/fineweb_train_*.bin",
        f"data.val_files={GOLF}/fineweb_val_*.bin",
        f"data.tokenizer={GOLF}/tokenizer.model", "model.vocab_size=512", "batch_tokens=1024",
        "seq_len=64", "micro_batch_tokens=1024", f"max_steps={STEPS}", "schedule.warmdown_steps=0",
        "optimizer.newton_schulz_dtype=fp32", "run_name=engine",
    )  # fmt: skip
    assert done.code == 0, done.err
    with open(Path("logs/runs/engine/metrics.csv"), encoding="utf-8") as file:
        engine = [float(row["train_loss"]) for row in csv.DictReader(file)]
    off = [abs(a - b) for a, b in zip(engine, plain_losses(), strict=True)]
    print(f"off by {max(off):.1e}")
    assert max(off) < 1e-5
    assert engine[-1] < engine[0] - 0.5
