"""A Llama: pre-norm blocks with learned norm weights, SwiGLU, rotary grouped-query attention.

Names, shapes and the order of rotary halves are those of Hugging Face's ``LlamaForCausalLM``, so
that its state dict is this one's (of a tied model without ``lm_head.weight``). The width of SwiGLU
is such that its three matrices have the weights of the baseline's two, unless ``more.mlp_dim``
says it.

Left out: biases, scaled rotary frequencies, dropout, KV cache, logits of a tail only.

Source: Touvron et al., arXiv 2302.13971; grouped queries: Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.attention import causal_attention
from qat.model.layers import in_autocast_dtype, rotary_angles
from qat.model.spec import ModelSpec

INIT_STD = 0.02  # of matrices; those that write into the residual stream 1 / sqrt(2 * layers) of it


def sizes_of(spec: ModelSpec) -> dict[str, Any]:
    """What only a Llama has, by default or as ``more`` says. ValueError for what it has not."""
    return spec.own(mlp_dim=2 * spec.mlp_mult * spec.dim // 3, rope_base=10_000.0, norm_eps=1e-6)


def rotate_halves(x_BTHD: Tensor, base: float) -> Tensor:
    """Each pair (i, i + D / 2) turned by position * base ** (-2 i / D)."""
    cos, sin = rotary_angles(x_BTHD, base)
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float) -> None:
        super().__init__()
        self.head_dim, self.rope_base = dim // num_heads, rope_base
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BTC).unflatten(-1, (-1, self.head_dim))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(q, self.rope_base), rotate_halves(k, self.rope_base)
        y_BHTD = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(2))


class WeightedNorm(nn.RMSNorm):
    """In the dtype of what it reads, also where weights are float32 and activations bf16."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, mlp_dim, bias=False)
        self.up_proj = nn.Linear(dim, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class LlamaBlock(nn.Module):
    def __init__(self, spec: ModelSpec, mlp_dim: int, rope_base: float, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = WeightedNorm(spec.dim, norm_eps)
        self.self_attn = LlamaAttention(spec.dim, spec.num_heads, spec.num_kv_heads, rope_base)
        self.post_attention_layernorm = WeightedNorm(spec.dim, norm_eps)
        self.mlp = SwiGLU(spec.dim, mlp_dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x = x_BTC + self.self_attn(self.input_layernorm(x_BTC))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaTrunk(nn.Module):
    """Token ids (B, T) -> normalised last hidden state (B, T, C)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        sizes = sizes_of(spec)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleList(LlamaBlock(spec, **sizes) for _ in range(spec.num_layers))
        self.norm = WeightedNorm(spec.dim, sizes["norm_eps"])

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = in_autocast_dtype(self.embed_tokens(ids_BT))
        for layer in self.layers:
            x_BTC = layer(x_BTC)
        return self.norm(x_BTC)


class Llama(nn.Module):
    """Token ids (B, T) -> float32 logits (B, T, V), or the mean loss in nats with targets."""

    sizes_of = staticmethod(sizes_of)

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.model = LlamaTrunk(spec)
        self.lm_head = (
            None if spec.tie_embeddings else nn.Linear(spec.dim, spec.vocab_size, bias=False)
        )
        residual_std = INIT_STD / (2 * spec.num_layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=residual_std if writes else INIT_STD)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        hidden_BTC = self.model(ids_BT)
        if self.lm_head is None:
            logits_BTV = F.linear(hidden_BTC, self.model.embed_tokens.weight).float()
        else:
            logits_BTV = self.lm_head(hidden_BTC).float()
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


ARCHITECTURE = Llama
