"""bitsandbytes: LLM.int8() (arXiv 2208.07339), NF4 and FP4 (arXiv 2305.14314).

Its layers replace those of the blocks, and their own code computes. LLM.int8() rounds activations
to int8 per token, through float16, but for columns that hold an outlier (6 and more, the paper's
threshold). The 4-bit layers multiply by the dequantized matrix in the dtype of the activations. The
library keeps its tables of levels once per layer: with double quantization that is 1 kB, more than
it saves on a matrix of fewer than 23,000 weights.

Blocks of 64 are the library's default; a matrix whose rows are no multiple of 64 gets blocks of 32.
Version 0.50 decodes blocks that cross from one row into the next wrongly on a CPU (a relative error
of 0.25 where its own codes and scales say 0.09).

Left out: the repacking that the 4-bit layers do at their first product on CPUs with AVX512-BF16. It
rounds activations and scales to bfloat16 and undoes double quantization, so that score and bytes
would depend on the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from torch import Tensor, nn

from qat.cabinet.variant import (
    EMBEDDING,
    Frozen,
    Kept,
    Variant,
    coded_bytes,
    failure,
    held_tensors,
    inner_bytes,
)

OUTLIER_THRESHOLD = 6.0
BLOCK_SIZES = (64, 32)

# a layer of floats -> the library's layer, and all tensors that it holds
Replace = Callable[[nn.Linear], tuple[nn.Linear, list[Tensor]]]


def bitsandbytes_variants(model: Frozen) -> list[Variant]:
    """LLM.int8, NF4, NF4 with double quantization, FP4."""

    def converted(replace: Replace) -> tuple[nn.Module, list[Tensor]]:
        module = model.copy()
        layers = model.inner_linears(module)
        replaced = {id(layer.weight) for layer in layers.values()}
        held = [tensor for tensor in held_tensors(module) if id(tensor) not in replaced]
        for name, layer in layers.items():
            theirs, tensors = replace(layer)
            theirs.bias = layer.bias
            module.set_submodule(name, theirs.eval())
            held += tensors
        return module, held

    def make(replace: Replace) -> Kept:
        module, held = converted(replace)
        embedding = EMBEDDING if model.wiring.ends else None
        return Kept(module, coded_bytes(held), inner_bytes(held), embedding)

    def missing(replace: Replace) -> str | None:
        return _missing(model) or failure(lambda: converted(replace)[0], model)

    rows: dict[str, Replace] = {
        "LLM.int8": _int8,
        "NF4": partial(_four_bit, "nf4", False),
        "NF4 double": partial(_four_bit, "nf4", True),
        "FP4": partial(_four_bit, "fp4", False),
    }
    return [
        Variant(
            f"bitsandbytes {name}",
            "bitsandbytes",
            partial(make, replace),
            partial(missing, replace),
        )
        for name, replace in rows.items()
    ]


def _missing(model: Frozen) -> str | None:
    if find_spec("bitsandbytes") is None:
        return "needs bitsandbytes: pip install -e '.[cabinet]'"
    if any(model.weights[name].size(1) % BLOCK_SIZES[-1] for name in model.matrices):
        return f"needs rows of a multiple of {BLOCK_SIZES[-1]} weights"
    return None


def _int8(layer: nn.Linear) -> tuple[nn.Linear, list[Tensor]]:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # It says at every product that it casts to float16, which is what LLM.int8() is.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    theirs = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device="meta",
    )
    weight = Int8Params(layer.weight.detach(), requires_grad=False)
    theirs.weight = weight.to(layer.weight.device)  # quantizes
    theirs.init_8bit_state()
    return theirs, [theirs.state.CB, theirs.state.SCB]


def _four_bit(kind: str, is_double: bool, layer: nn.Linear) -> tuple[nn.Linear, list[Tensor]]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    theirs = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compress_statistics=is_double,
        quant_type=kind,
        device="meta",
    )
    theirs.support_avx512bf16_for_cpu = False
    block_size = next(size for size in BLOCK_SIZES if layer.in_features % size == 0)
    weight = Params4bit(
        layer.weight.detach(),
        blocksize=block_size,
        compress_statistics=is_double,
        quant_type=kind,
        module=theirs,
    )
    theirs.weight = weight.to(layer.weight.device)  # quantizes
    state = theirs.weight.quant_state
    held = [theirs.weight.data, state.absmax, state.code]
    if is_double:
        held += [state.offset, state.state2.absmax, state.state2.code]
    return theirs, held
