"""``out=FILE.gguf``: a Llama with its tokenizer, as llama.cpp and its relatives read it.

Tensors on a grid are packed from the artifact's own codes and scales (``gguf_blocks.py``). The
package ``gguf`` then reads the file, which gets its name when what that makes of it are the
artifact's weights, bit for bit.

llama.cpp turns the neighbours (2 i, 2 i + 1) of a head where this project and Hugging Face turn
(i, i + D / 2). So the rows of queries and keys are written in another order, codes and scales with
them; the sums are the same.

Left out: architectures but Llama; tokenizers but BPE with byte pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.artifact.container import whole_file
from qat.evaluation.open_model import OpenedModel
from qat.export.gguf_blocks import gguf_tensor
from qat.model.llama import sizes_of
from qat.model.spec import ModelSpec
from qat.text.byte_table import normalisation_fault
from qat.text.piece_table import PieceTable
from qat.text.tokenizer import Tokenizer

ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Of one of a Llama's tensors."""
    if name in ENDS:
        return ENDS[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{OF_LAYER[inner]}.weight"


def row_order(name: str, spec: ModelSpec) -> Tensor | None:
    """Where llama.cpp wants the rows of queries and keys; None: where they are."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    halves = torch.arange(heads * (spec.dim // spec.num_heads)).view(heads, 2, -1)
    return halves.transpose(1, 2).flatten()


def write_gguf(out: Path, opened: OpenedModel, tokenizer: Tokenizer) -> list[str]:
    """Write the file and prove it; what there is to say of it.

    ValueError: what GGUF cannot hold. OSError: what the disk does not take; nothing is left.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    spec, artifact = opened.spec, opened.artifact
    table = PieceTable.read(tokenizer.path)
    if table.fault:
        raise ValueError(f"its tokenizer, {tokenizer.path}, is none of GGUF: {table.fault}")
    kinds: dict[str, int] = {}
    with whole_file(out) as file:
        writer = GGUFWriter(file.name, "llama")
        for item in artifact.encoded:
            name = item.entry.name
            kind, data = gguf_tensor(item, row_order(name, spec))
            writer.add_tensor(gguf_name(name), data, raw_dtype=GGMLQuantizationType[kind])
            kinds[kind] = kinds.get(kind, 0) + 1
        _add_sizes(writer, opened, out.stem)
        _add_tokenizer(writer, tokenizer, table)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        count = check_same_weights(Path(file.name), artifact.weights, spec)
    blocks = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    said = [f"tensors        {blocks}", f"proof          {count} tensors, bit for bit"]
    if fault := normalisation_fault(tokenizer.pieces):
        said.append(f"tokenizer      {fault.partition(':')[0]}; llama.cpp does not")
    return said


def _add_sizes(writer: Any, opened: OpenedModel, name: str) -> None:
    spec, sizes = opened.spec, sizes_of(opened.spec)
    writer.add_name(name)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(opened.seq_len)
    writer.add_embedding_length(spec.dim)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(sizes["mlp_dim"])
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_rope_dimension_count(spec.dim // spec.num_heads)
    writer.add_rope_freq_base(sizes["rope_base"])
    writer.add_layer_norm_rms_eps(sizes["norm_eps"])
    writer.add_quantization_version(2)  # of ggml's blocks, as they are since 2023


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, table: PieceTable) -> None:
    """Kinds of pieces have the same numbers in GGUF. A text ends where the next one starts.
    UserError if the vocabulary has no BOS."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(table.texts)
    writer.add_token_scores(table.scores)
    writer.add_token_types(table.kinds)
    writer.add_bos_token_id(tokenizer.document_start)
    writer.add_eos_token_id(tokenizer.document_start)
    writer.add_unk_token_id(tokenizer.pieces.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(table.adds_space)


def check_same_weights(path: Path, weights: Mapping[str, Tensor], spec: ModelSpec) -> int:
    """How many tensors the package ``gguf`` reads from the file, each equal to ours. ValueError
    names one that is not."""
    from gguf import GGUFReader, quants

    read = {t.name: t for t in GGUFReader(path).tensors}
    for name, w in weights.items():
        tensor, order = read.pop(gguf_name(name)), row_order(name, spec)
        found = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = w if order is None else w[order]
        if not torch.equal(found.flatten().view(torch.int32), expected.flatten().view(torch.int32)):
            raise ValueError(
                f"tensor {name} does not survive in blocks of {tensor.tensor_type.name}"
            )
    if read:
        raise ValueError(f"the file has tensors too many: {min(read)}")
    return len(weights)
