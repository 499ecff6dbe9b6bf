"""A Llama as a .gguf file: what it says, that it is proved, and what GGUF cannot hold."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

from qat.evaluation.open_model import OpenedModel
from qat.export.gguf_file import check_same_weights, write_gguf
from qat.quantize.grid import Grid
from qat.text.tokenizer import Tokenizer
from tests.conftest import GOLF
from tests.export.conftest import RULES, SPEC, untied

gguf = pytest.importorskip("gguf", reason="needs gguf (export)")
Stored = Callable[..., OpenedModel]


def field(reader, name: str):
    return reader.get_field(name).contents()


def test_what_it_says(stored: Stored, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = replace(untied(), more={"rope_base": 5e5, "norm_eps": 1e-5, "mlp_dim": 96})
    said = write_gguf(tmp_path / "m.gguf", stored(spec), tokenizer)
    assert said == ["tensors        5 F32, 16 Q8_0", "proof          21 tensors, bit for bit"]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama", "general.name": "m", "llama.vocab_size": 320,
        "llama.context_length": 128, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e5, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.model": "llama",
    }  # fmt: skip
    assert {name: field(reader, name) for name in expected} == expected
    assert field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    pieces, ids = tokenizer.pieces, range(320)
    assert field(reader, "tokenizer.ggml.tokens") == [pieces.id_to_piece(i) for i in ids]
    assert field(reader, "tokenizer.ggml.scores") == [pieces.get_score(i) for i in ids]
    kinds = [6 if pieces.is_byte(i) else 3 if pieces.is_control(i) else 1 for i in ids]
    assert field(reader, "tokenizer.ggml.token_type") == [2, *kinds[1:]]
    assert {t.name for t in reader.tensors} >= {"output.weight", "blk.1.attn_output.weight"}


def test_one_bit_more_and_it_is_no_proof(
    stored: Stored, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    opened, path = stored(), tmp_path / "m.gguf"
    write_gguf(path, opened, tokenizer)
    weights = opened.artifact.weights
    assert check_same_weights(path, weights, SPEC) == 20
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_k.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight does not survive"):
        check_same_weights(path, weights, SPEC)


def test_nothing_is_left_of_what_cannot_be_held(
    stored: Stored, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rules = {"*layers.1.mlp.up_proj*": "fp32"} | RULES
    for opened, reason in (
        (stored(grid=Grid(bits=8, scale_dtype="bf16"), rules=rules), "scales of bf16"),
        (stored(replace(SPEC, dim=48)), "model.embed_tokens.weight has rows of 48 weights"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_gguf(tmp_path / "m.gguf", opened, tokenizer)
        assert [path.name for path in tmp_path.iterdir()] == ["a.qat"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "its pieces are not joined by BPE"),
        ({"model_type": "bpe", "vocab_size": 40}, "it has no byte fallback"),
    ],
    ids=str,
)
def test_tokenizers_that_gguf_has_not(
    asked: dict, reason: str, stored: Stored, corpus: Path, tmp_path: Path
) -> None:
    asked = {"vocab_size": 300} | asked
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.read_text().splitlines()[:500]), model_writer=model,
        minloglevel=2, hard_vocab_limit=False, **asked,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=reason):
        write_gguf(tmp_path / "m.gguf", stored(), Tokenizer(tmp_path / "t.model"))
    assert not (tmp_path / "m.gguf").exists()


def test_a_text_that_is_changed_first_is_said(stored: Stored, tmp_path: Path) -> None:
    spec = replace(SPEC, vocab_size=512)
    said = write_gguf(tmp_path / "m.gguf", stored(spec), Tokenizer(GOLF / "tokenizer.model"))
    assert said[-1] == (
        "tokenizer      it replaces or drops characters (NFKC and the like), drops spaces at the "
        "ends of a text and in runs; llama.cpp does not"
    )


def test_kept_floats(stored: Stored, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rules = {"*embed*": "bf16", "*mlp*": "fp16", "*input_layernorm*": "bf16"} | RULES
    opened = stored(grid=Grid(bits=4, group_size=32), rules=rules)
    said = write_gguf(tmp_path / "m.gguf", opened, tokenizer)
    assert said[0] == "tensors        1 BF16, 6 F16, 5 F32, 8 Q4_0"
    w = opened.artifact.weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(w, w.half().float())
