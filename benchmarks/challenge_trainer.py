"""The challenge's baseline trainer, as its script trains: the opponent of ``train_step.py``.

It shares no code with ``qat/``, so that no handicap of this project's can slow it down. Its ways
are those of the challenge's ``train_gpt.py`` (2026-03): activations and embedding in bfloat16,
matrices in float32 and cast where they are used, rotary tables kept, torch's attention, softcapped
logits held whole, Muon matrix by matrix with a compiled Newton-Schulz iteration, fused Adam.
Parameter names and shapes are those of ``qat.model.gpt``, so weights can be loaded from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SOFTCAP = 30.0


class CastLinear(nn.Linear):
    """A float32 matrix without bias, used in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, length: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.c_q = CastLinear(dim, dim)
        self.c_k = CastLinear(dim, kv_heads * self.head_dim)
        self.c_v = CastLinear(dim, kv_heads * self.head_dim)
        self.proj = CastLinear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((heads,), 1.5))
        frequency = 10_000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.outer(torch.arange(length).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos + high * sin, high * cos - low * sin), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.reshape(batch, length, heads, self.head_dim).transpose(1, 2)

        q = self.turned(normed(split(self.c_q(x), self.heads)))
        k = self.turned(normed(split(self.c_k(x), self.kv_heads)))
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(
            q, k, split(self.c_v(x), self.kv_heads), is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return self.proj(y.transpose(1, 2).contiguous().reshape(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.fc, self.proj = CastLinear(dim, mult * dim), CastLinear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, mult: int, length: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, kv_heads, length)
        self.mlp = MLP(dim, mult)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * first
        x = x + self.attn_scale.to(x.dtype) * self.attn(normed(x))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(normed(x))


class ChallengeGPT(nn.Module):
    """Mean loss in nats of ids and targets (B, length)."""

    def __init__(
        self, vocab: int, layers: int, dim: int, heads: int, kv_heads: int, mult: int, tied: bool,
        length: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, dim)
        self.half = layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.half, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, kv_heads, mult, length) for _ in range(layers)
        )
        self.lm_head = None if tied else CastLinear(dim, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = first = normed(self.tok_emb(ids))
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and kept:
                x = x + self.skip_weights[i - self.half].to(x.dtype) * kept.pop()
            x = block(x, first)
            if i < self.half:
                kept.append(x)
        x = normed(x).flatten(0, 1)
        if self.lm_head is None:
            raw = F.linear(x, self.tok_emb.weight.to(x.dtype))
        else:
            raw = self.lm_head(x)
        return F.cross_entropy((SOFTCAP * torch.tanh(raw / SOFTCAP)).float(), targets.flatten())


def orthogonal(gradient: Tensor) -> Tensor:
    """Five Newton-Schulz iterations in bfloat16 on one matrix."""
    a, b, c = NEWTON_SCHULZ
    x = gradient.bfloat16()
    x = x / (x.norm() + 1e-7)
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class MatrixMuon(torch.optim.Optimizer):
    """Nesterov momentum, then each matrix on its own."""

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, orthogonal: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.85})
        self.orthogonal = orthogonal

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            updates = []
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = self.orthogonal(p.grad.add(buffer, alpha=group["momentum"]))
                updates.append(update * max(1, p.size(0) / p.size(1)) ** 0.5)
            for p, update in zip(group["params"], updates, strict=True):
                p.add_(update.to(p.dtype), alpha=-group["lr"])


class ChallengeTrainer:
    """Weights, optimizers and one update of the challenge's baseline.

    ``start`` is a state dict of ``qat.model.gpt.GPT``; ``sizes`` are ``ChallengeGPT``'s arguments.
    """

    def __init__(
        self, sizes: tuple, start: dict[str, Tensor], device: torch.device, bf16: bool,
        compiled: bool,
    ) -> None:  # fmt: skip
        model = ChallengeGPT(*sizes)
        model.load_state_dict(start)
        self.model, self.device, self.bf16 = model.to(device), device, bf16
        if bf16:
            model.tok_emb.bfloat16()
        self.loss = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and min(p.shape) > 2]
        taken = {id(p) for p in matrices} | {id(p) for p in model.tok_emb.parameters()}
        head = list(model.lm_head.parameters()) if model.lm_head is not None else []
        taken |= {id(p) for p in head}
        vectors = [p for p in model.parameters() if id(p) not in taken]
        groups = [
            {"params": [model.tok_emb.weight], "lr": 0.6 if head else 0.05},
            {"params": vectors, "lr": 0.04},
        ] + ([{"params": head, "lr": 0.008}] if head else [])
        iterate = torch.compile(orthogonal) if compiled else orthogonal
        self.optimizers: list[torch.optim.Optimizer] = [
            MatrixMuon(matrices, 0.04, iterate),
            torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8, fused=True),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def update(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, rate: float, momentum: float
    ) -> Tensor:
        """One update over ``count`` micro-batches; its mean loss."""
        total = torch.zeros((), device=self.device)
        for ids, targets in batches:
            ids = ids.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(ids, targets)
            total += loss.detach() / count
            (loss / count).backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_lr"]
                if "momentum" in group:
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total
