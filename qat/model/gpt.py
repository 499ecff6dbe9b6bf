"""The challenge's baseline GPT: U-net skips, ReLU^2, grouped-query attention, softcapped logits.

Parameter names, shapes and initialisation order are those of the parameter-golf baseline, so that
weights travel between that trainer and this one, and one seed gives both the same start. The model
is plain ``nn.Linear`` / ``nn.Embedding``: it knows nothing of quantization, because the weights it
computes with are handed in from outside (``torch.func.functional_call``).

Left out: dropout, biases, KV cache (samples here are short).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.attention import causal_attention
from qat.model.layers import (
    asks_for_kernels,
    heads_fit,
    in_autocast_dtype,
    mlp_fits,
    rms_norm,
    rotary_angles,
)
from qat.model.losses import softcap, softcap_cross_entropy
from qat.model.spec import ModelSpec

OUTPUT_STD_TIED = 0.005
ROPE_BASE = 10_000.0
QUERY_GAIN = 1.5
LOGIT_SOFTCAP = 30.0


def rotate(x_BTHD: Tensor, first_position: int = 0) -> Tensor:
    """Rotary position embedding over the two halves of the head dimension."""
    cos, sin = rotary_angles(x_BTHD, ROPE_BASE, first_position)
    a, b = x_BTHD.chunk(2, dim=-1)
    turned = torch.addcmul(a * cos, b, sin), torch.addcmul(b * cos, a, sin, value=-1)
    return torch.cat(turned, dim=-1)


class Attention(nn.Module):
    attend = staticmethod(causal_attention)

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.has_kernel = heads_fit(self.head_dim)
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, kv_dim, bias=False)
        self.c_v = nn.Linear(dim, kv_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((num_heads,), QUERY_GAIN))

    def forward(self, x_BTC: Tensor, tail: int | None = None) -> Tensor:
        time = x_BTC.size(1)
        first = 0 if tail is None else time - tail
        if first == 0 and self.has_kernel and asks_for_kernels(x_BTC):
            q, k, v = self._fused_heads(x_BTC)
        else:
            projected = self.c_q(x_BTC[:, first:]), self.c_k(x_BTC), self.c_v(x_BTC)
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
            q = rotate(rms_norm(q), first) * self.q_gain.to(q.dtype)[:, None]
            k = rotate(rms_norm(k))
        # Heads are transposed as views only, so that no pass over memory moves them.
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))

    def _fused_heads(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, by one product with all three matrices, and one kernel after it."""
        matrices = [layer.weight for layer in (self.c_q, self.c_k, self.c_v)]
        joined = F.linear(x_BTC, torch.cat(matrices))
        angles = rotary_angles(joined.unflatten(-1, (-1, self.head_dim)), ROPE_BASE)
        cos, sin = (table.flatten(1) for table in angles)
        kv_heads = self.c_k.out_features // self.head_dim
        return torch.ops.qat.turned_heads(joined, self.q_gain, cos, sin, kv_heads)


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, mult * dim, bias=False)
        self.proj = nn.Linear(mult * dim, dim, bias=False)
        self.has_kernels = mlp_fits(dim, mult * dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.has_kernels and asks_for_kernels(x_BTC):
            matrices = (in_autocast_dtype(layer.weight) for layer in (self.fc, self.proj))
            x_NC = in_autocast_dtype(x_BTC).flatten(0, 1)
            return torch.ops.qat.relu_squared_mlp(x_NC, *matrices)[0].view_as(x_BTC)
        return self.proj(F.relu(self.fc(x_BTC)).square())


class Block(nn.Module):
    """Attention and MLP, scaled per channel; ``resid_mix`` blends in the first hidden state.

    With ``tail`` only the last positions are computed (keys and values are of all of them).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn = Attention(spec.dim, spec.num_heads, spec.num_kv_heads)
        self.mlp = MLP(spec.dim, spec.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(spec.dim))
        self.mlp_scale = nn.Parameter(torch.ones(spec.dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(spec.dim), torch.zeros(spec.dim))))

    def forward(self, x_BTC: Tensor, first_BTC: Tensor, tail: int | None = None) -> Tensor:
        keep, again = self.resid_mix.to(x_BTC.dtype)
        x = torch.addcmul(again * first_BTC, keep, x_BTC)
        attended = self.attn(rms_norm(x), tail)
        x = x if tail is None else x[:, -tail:]
        x = torch.addcmul(x, self.attn_scale.to(x.dtype), attended)
        return torch.addcmul(x, self.mlp_scale.to(x.dtype), self.mlp(rms_norm(x)))


class GPT(nn.Module):
    """Token ids (B, T) -> float32 logits (B, T, V), or the mean loss in nats with targets.

    ``tail`` = n gives the logits of the last n positions only, (B, n, V), at less than their price.
    The first half of the blocks push their output, the second half pop and add it, scaled per
    channel by ``skip_weights``.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        spec.own()
        self.tok_emb = nn.Embedding(spec.vocab_size, spec.dim)
        self.num_pushing = spec.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.num_pushing, spec.dim))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.lm_head = (
            None if spec.tie_embeddings else nn.Linear(spec.dim, spec.vocab_size, bias=False)
        )
        self._initialise()

    def _initialise(self) -> None:
        """Output projections start at zero; a tied embedding, being the head too, starts small."""
        if self.lm_head is None:
            nn.init.normal_(self.tok_emb.weight, std=OUTPUT_STD_TIED)
        else:
            nn.init.zeros_(self.lm_head.weight)
        for name, module in self.blocks.named_modules():
            if name.endswith(".proj"):
                nn.init.zeros_(module.weight)

    def hidden(self, ids_BT: Tensor, tail: int | None = None) -> Tensor:
        """Normalised last hidden state (B, T, C), or (B, tail, C)."""
        x = first = rms_norm(in_autocast_dtype(self.tok_emb(ids_BT)))
        pushed: list[Tensor] = []
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            if index < self.num_pushing:
                x = block(x, first, tail if index == last else None)
                pushed.append(x)
            else:
                if pushed:
                    skip = self.skip_weights[index - self.num_pushing].to(x.dtype)
                    x = x + skip * pushed.pop()
                x = block(x, first, tail if index == last else None)
        return rms_norm(x)

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor | None = None, tail: int | None = None
    ) -> Tensor:
        hidden_BTC = self.hidden(ids_BT, tail)
        embedding_VC = self.tok_emb.weight
        if targets_BT is None:
            head = self.lm_head
            raw = F.linear(hidden_BTC, embedding_VC) if head is None else head(hidden_BTC)
            return softcap(raw, LOGIT_SOFTCAP)
        head_VC = embedding_VC if self.lm_head is None else self.lm_head.weight
        hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
        return softcap_cross_entropy(hidden_NC, head_VC, targets_N, LOGIT_SOFTCAP)

    @staticmethod
    def folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that compute the same, the channel scales of each block's outputs taken into the
        rows of the matrices before them."""
        changed = dict(weights)
        for name, scale in weights.items():
            for kind in ("attn", "mlp"):
                if name.endswith(f".{kind}_scale"):
                    matrix = name.removesuffix(f"{kind}_scale") + f"{kind}.proj.weight"
                    changed[matrix] = changed[matrix] * scale[:, None]
                    changed[name] = torch.ones_like(scale)
        return changed

    @staticmethod
    def numbers_moved(spec: ModelSpec) -> int:
        """Activations read and written per token, every operation its inputs and outputs once."""
        dim, mlp_dim, vocab_size = spec.dim, spec.mlp_mult * spec.dim, spec.vocab_size
        kv_dim = spec.num_kv_heads * (dim // spec.num_heads)
        norm, add = 2 * dim, 3 * dim
        attention = (
            (3 * dim + dim + 2 * kv_dim)  # to queries, keys and values
            + 2 * 2 * (dim + kv_dim)  # norm and rotation of queries and keys
            + 2 * dim  # gain of the queries
            + (2 * dim + 2 * kv_dim)  # attention itself
            + 2 * dim  # projection
        )
        mlp = (dim + mlp_dim) + 2 * mlp_dim + (mlp_dim + dim)  # up, ReLU^2, down
        block = add + norm + attention + add + norm + mlp + add
        ends = 2 * dim + norm + norm + (dim + vocab_size) + 2 * vocab_size  # embedding to softcap
        return spec.num_layers * block + spec.num_layers // 2 * add + ends


ARCHITECTURE = GPT
