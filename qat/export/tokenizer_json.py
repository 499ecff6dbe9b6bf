"""A SentencePiece vocabulary as ``tokenizer.json``, which ``transformers`` reads by itself.

BPE there joins the pair of the least rank; SentencePiece the pair whose joined piece has the
highest score, the first such in the text. So pairs are ranked by that score, all pairs that make
the same piece one after the other. Where two ways to the same piece overlap ("aaa" of "aa") the
order may differ: the tests count how often, on real text never.

Of a vocabulary that is no BPE, or that cannot spell every byte, there is no such file.
"""

from __future__ import annotations

import base64
from typing import Any

from qat.text.byte_table import SPACE
from qat.text.piece_table import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, PieceTable
from qat.text.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> tuple[dict[str, dict], str | None]:
    """Name -> content, and why there is none."""
    table = PieceTable.read(tokenizer.path)
    if table.fault:
        return {}, table.fault
    bos = table.texts[tokenizer.document_start]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "unk_token": table.texts[tokenizer.pieces.unk_id()],
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": _tokenizer(tokenizer, table), "tokenizer_config.json": config}, None


def _tokenizer(tokenizer: Tokenizer, table: PieceTable) -> dict[str, Any]:
    bos_id, unk_id = tokenizer.document_start, tokenizer.pieces.unk_id()
    bos = table.texts[bos_id]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]  # fmt: skip
    if table.adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token, "content": text, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": kind != USER_DEFINED,
            }
            for token, (text, kind) in enumerate(zip(table.texts, table.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(table)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": table.texts[unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: token for token, text in enumerate(table.texts)},
            "merges": merges(table),
        },
    }  # fmt: skip


def _normalizers(table: PieceTable) -> list[dict[str, Any]]:
    """What SentencePiece does to a text before it cuts it, in its order."""
    found: list[dict[str, Any]] = []
    if table.charsmap:
        charsmap = base64.b64encode(table.charsmap).decode()
        found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if table.drops_spaces:
        found.append({"type": "Strip", "strip_left": True, "strip_right": True})
        found.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if table.adds_space:
        found.append({"type": "Prepend", "prepend": SPACE})
    return [*found, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def merges(table: PieceTable) -> list[list[str]]:
    """Pairs of pieces that make a piece, those that SentencePiece joins first at the front."""
    scores = {
        text: score
        for text, score, kind in zip(table.texts, table.scores, table.kinds, strict=True)
        if kind == NORMAL
    }
    pairs = [
        (-score, at, [text[:at], text[at:]])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return [pair for _, _, pair in sorted(pairs)]
