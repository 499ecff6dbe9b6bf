"""What a variant is: one way to store a trained model, its bytes, and what it computes with.

Libraries that replace layers get the matrices but the head. The token embedding, which is the head
too where it is tied, stays float32, as do an untied head and all vectors: libraries
quantize ``nn.Linear`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.artifact.coder import encode_section
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.model.wiring import wiring_of


@dataclass(frozen=True)
class Kept:
    """What a variant makes of a model.

    ``weights``: name -> what the forward pass computes with, float32 or a library's own tensor.
    ``module``: what computes in place of the plain model, if the library has layers of its own (its
    parameters are then in it, and ``weights`` are those that it does not hold).
    ``disk_bytes``: of a file, packed and entropy-coded, scales and zero points included.
    ``memory_bytes``: of all tensors as they are held to compute with them (``inner_bytes``).
    ``embedding``: how the token embedding is stored, as tables say it.
    """

    weights: dict[str, Tensor]
    disk_bytes: int
    memory_bytes: int
    embedding: str
    module: nn.Module | None = None
    precision: str = "fp32"  # fp32 | bf16 (autocast): what it computes in


@dataclass(frozen=True)
class Variant:
    """A row of the table. ``missing`` returns why this machine cannot make it, or None."""

    name: str
    family: str  # float | rounding | gptq | scaled | low rank | torchao | bitsandbytes | qat
    make: Callable[[], Kept]
    missing: Callable[[], str | None] = lambda: None


def unmade(name: str, family: str, reason: str) -> Variant:
    """A row that no machine can make yet, and why."""

    def make() -> Kept:
        raise AssertionError(reason)

    return Variant(name, family, make, lambda: reason)


def inner_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """What is held: of a tensor subclass its inner tensors (its outer dtype and size are what it
    stands for), of any other tensor itself."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from inner_tensors(getattr(tensor, name) for name in names)
        else:
            yield tensor.detach()


def inner_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of storage of the inner tensors. Storage that is shared counts once."""
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in inner_tensors(tensors)}
    return sum(held.values())


def coded_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the inner tensors, one after another, through zstd: a library's file, compressed."""
    raw = b"".join(
        t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for t in inner_tensors(tensors)
    )
    return len(encode_section(raw, (), "zstd")[1])


EMBEDDING = "float32"  # how tables call what these libraries make of it


def float_model(spec: ModelSpec, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A model in evaluation mode. It shares the storage of what is on the device already, but
    never a parameter: libraries change those in place."""
    model = empty_model(spec)
    placed = {name: w.detach().to(device) for name, w in weights.items()}
    model.load_state_dict(placed, assign=True)
    return model.requires_grad_(False).eval()


def inner_linears(model: nn.Module, spec: ModelSpec) -> dict[str, nn.Linear]:
    """Name -> layer, of all matrices but the head."""
    matrices = wiring_of(spec).matrices
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" in matrices
    }
