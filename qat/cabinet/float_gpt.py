"""The plain GPT with a model's weights in it, for libraries that replace its layers.

They get the matrices of the blocks. The token embedding, which is the head too where it is tied,
stays float32, as do an untied head, gains and skip weights: libraries quantize ``nn.Linear`` only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.language.gpt import GPT, GPTShape

EMBEDDING = "float32"  # how tables call what these libraries make of it


def float_gpt(shape: GPTShape, weights: dict[str, Tensor], device: torch.device) -> GPT:
    """A model in evaluation mode. It shares the storage of what is on the device already, but
    never a parameter: libraries change those in place."""
    with torch.device("meta"):
        gpt = GPT(shape)
    placed = {name: w.detach().to(device) for name, w in weights.items()}
    gpt.load_state_dict(placed, assign=True)
    return gpt.requires_grad_(False).eval()


def block_linears(gpt: GPT) -> dict[str, nn.Linear]:
    """Name -> layer, of all matrices of the blocks."""
    named = gpt.blocks.named_modules(prefix="blocks")
    return {name: layer for name, layer in named if isinstance(layer, nn.Linear)}
