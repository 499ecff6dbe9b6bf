"""GGUF block formats: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, in blocks of 32 with a float16 scale each.

Blocks are made by the package ``gguf``, whose arithmetic is that of ggml's reference, and written
to a .gguf file. The variant is what that file holds, read back. Matrices whose rows are no multiple
of 32 stay float16 (ggml has no partial block); vectors and gains stay float32, as llama.cpp keeps
them.

``memory_bytes`` are those of the blocks: ggml maps the file and computes with them. Here they are
dequantized to float32 first, so activations are not rounded to int8 as ggml's CPU kernels do.

Left out: K-quants (the package only reads them) and llama.cpp itself, which does not know this
architecture.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.cabinet.variant import Kept, Variant
from qat.errors import UserError
from qat.model.spec import ModelSpec
from qat.model.wiring import wiring_of

FORMATS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK_SIZE = 32
ARCHITECTURE = "qat"  # general.architecture, which every file names


def gguf_variants(spec: ModelSpec, weights: dict[str, Tensor], folder: Path) -> list[Variant]:
    """One variant per format; ``weights``: name -> float32 tensor.

    Making one writes ``folder``/FORMAT.gguf. UserError if that cannot be written.
    """

    def make(name: str) -> Kept:
        path = folder / f"{name}.gguf"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, name, weights, spec)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        decoded, num_bytes = _read(path)
        on_device = {key: w.to(weights[key].device) for key, w in decoded.items()}
        embedding = name
        if spec.dim % BLOCK_SIZE:
            embedding = f"F16 (rows of {spec.dim} are no multiple of {BLOCK_SIZE})"
        return Kept(on_device, path.stat().st_size, num_bytes, embedding)

    return [Variant(f"gguf {name}", "gguf", partial(make, name), _missing) for name in FORMATS]


def _missing() -> str | None:
    return None if find_spec("gguf") else "needs gguf: pip install -e '.[cabinet]'"


def _write(path: Path, name: str, weights: dict[str, Tensor], spec: ModelSpec) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    wiring = wiring_of(spec)
    writer = GGUFWriter(path, ARCHITECTURE)
    for key, weight in weights.items():
        kind = "F32"
        if key in wiring.matrices or key in wiring.ends:
            kind = "F16" if weight.size(-1) % BLOCK_SIZE else name
        dtype = GGMLQuantizationType[kind]
        blocks = quants.quantize(weight.detach().cpu().numpy().astype(np.float32), dtype)
        writer.add_tensor(key, blocks, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """(name -> float32 tensor, bytes of all blocks) of a .gguf file."""
    from gguf import GGUFReader, quants

    tensors = GGUFReader(path).tensors
    decoded = {t.name: torch.tensor(quants.dequantize(t.data, t.tensor_type)) for t in tensors}
    return decoded, sum(t.n_bytes for t in tensors)
