"""``eval.py task=audit``: whether bits per byte of a split would mean what they say.

Exit code 0 if all is sound, 2 if there is a FAULT. Duplicates and empty documents inside a split
are counted, but are no fault: they weigh a text, they do not leak it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qat.evaluation.open_model import artifact_path, open_model, open_validation
from qat.text import byte_table as vocabulary
from qat.text.audit import Audit, StreamFacts, audit
from qat.text.shards import TokenStream
from qat.text.source import Source, from_settings
from qat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

NOT_SOUND_EXIT_CODE = 2


def _open(s: EvalTaskSettings) -> tuple[Source, Tokenizer]:
    """The data of an artifact, or that the settings name."""
    if s.artifact or s.run:
        return open_validation(open_model(artifact_path(s), s), s.data)
    source = from_settings(s.data, s.model.vocab_size)
    return source, Tokenizer(source.tokenizer)


def faults(found: Audit, tokenizer: Tokenizer, notes: dict[str, Any]) -> list[str]:
    """Why a score on this data is not what it seems; ``notes``: those of the data's preparation."""
    lines = [f"data.tokenizer: {fault}" for fault in vocabulary.faults(tokenizer.pieces)]
    for side, facts in (("val", found.val), ("train", found.train)):
        if facts is None:
            continue
        if facts.num_outside:
            lines.append(
                f"{facts.num_outside} {side} tokens are outside the vocabulary, which ends at "
                f"{tokenizer.vocab_size - 1} (highest id {facts.highest_id})"
            )
        if facts.num_unknown:
            lines.append(f"{facts.num_unknown} {side} tokens are unknown: their bytes are lost")
        if not facts.starts_with_bos:
            lines.append(
                f"the {side} tokens do not start with BOS (id {tokenizer.document_start}): their "
                "first document is cut, or none is marked"
            )
        if not facts.num_bytes:
            lines.append(f"the {side} tokens stand for no bytes of text")
        noted = notes.get(f"{side}_bytes", facts.num_bytes)
        if noted != facts.num_bytes:
            lines.append(f"the {side} tokens count {facts.num_bytes} bytes, their text had {noted}")
    if found.overlap is not None and found.overlap.num_documents:
        lines.append(
            f"{found.overlap.num_documents} of {found.val.num_documents} validation documents are "
            "in the training text"
        )
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.2%})"


def _column(files: list[Path], facts: StreamFacts, noted_bytes: int | None) -> list[str]:
    return [
        f"{len(files):,}",
        f"{facts.num_tokens:,}",
        f"{facts.highest_id:,}",
        f"{facts.num_outside:,}",
        f"{facts.num_unknown:,}",
        f"{facts.num_documents:,}",
        f"{facts.num_empty:,}",
        f"{facts.num_tokens / facts.num_documents:,.1f}",
        f"{facts.longest_tokens:,}",
        f"{facts.num_bytes:,}",
        "unknown" if noted_bytes is None else f"{noted_bytes:,}",
        f"{facts.num_bytes / facts.num_tokens:.4f}",
    ]


ROWS = (
    "shards", "tokens", "highest token id", "ids outside vocabulary", "unknown tokens",
    "documents", "empty documents", "tokens per document", "longest document", "bytes, by tokens",
    "bytes, as prepared", "bytes per token",
)  # fmt: skip


def _print(found: Audit, source: Source, tokenizer: Tokenizer) -> None:
    columns = [_column(source.val_files, found.val, source.notes.get("val_bytes"))]
    if found.train is not None:
        columns.append(_column(source.train_files, found.train, source.notes.get("train_bytes")))
    print(f"data       {source.identity['name']}")
    print(f"tokenizer  {tokenizer.path} ({tokenizer.vocab_size} pieces)")
    print(" " * 23 + "".join(f"{title:>17}" for title in ("val", "train")[: len(columns)]))
    for title, *cells in zip(ROWS, *columns, strict=True):
        print(f"{title:23}" + "".join(f"{cell:>17}" for cell in cells))
    val = found.val
    print(
        f"val documents that repeat another one  {_share(found.val_duplicates, val.num_documents)}"
    )
    if found.overlap is None:
        print("val documents in the training text     not checked: no training text is named")
    else:
        documents = _share(found.overlap.num_documents, val.num_documents)
        num_bytes = _share(found.overlap.num_bytes, val.num_bytes)
        print(f"val documents in the training text     {documents}; bytes {num_bytes}")


def run(s: EvalTaskSettings, budget: Budget) -> int:
    source, tokenizer = _open(s)
    found = audit(
        TokenStream(source.val_files, "data.val_files"),
        TokenStream(source.train_files, "data.train_files") if source.train_files else None,
        vocabulary.byte_table(tokenizer.pieces),
        tokenizer.document_start,
        tokenizer.pieces.unk_id(),
        Console(stderr=True),
    )
    _print(found, source, tokenizer)
    lines = faults(found, tokenizer, source.notes)
    for line in lines:
        print(f"FAULT  {line}")
    print(f"verdict: NOT SOUND: {'; '.join(lines)}" if lines else "verdict: sound")
    return NOT_SOUND_EXIT_CODE if lines else 0
