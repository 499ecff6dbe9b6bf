"""Any amount of text takes bounded memory, and makes the same shards however it is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qat.text import corpus, source

Patch = pytest.MonkeyPatch


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "w.jsonl"
    lines = (json.dumps({"text": f"{n} words, {n * 7} more \u2581 {n % 13}"}) for n in range(4000))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.slow
def test_the_same_shards_whatever_is_encoded_at_a_time(
    words: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    found = []
    for batch_bytes in (1, 5_000, 1_000_000):
        monkeypatch.setattr(source, "BATCH_BYTES", batch_bytes)
        source.from_text([words], 300, 0.2, tmp_path / str(batch_bytes))
        (notes,) = (tmp_path / str(batch_bytes)).glob("*/notes.json")
        files = sorted(notes.parent.iterdir())
        found.append([(file.name, file.read_bytes()) for file in files])
    assert [name for name, _ in found[0]] == [
        "notes.json", "tokenizer.model", "train_000000.bin", "val_000000.bin",
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]


def test_batches_hold_so_many_bytes_and_a_document_more(monkeypatch: Patch) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 1_000)
    texts = [f"{n}" + "é" * 150 for n in range(2_000)]
    batches = list(source._batches(texts, 0.3))
    for side in ("train", "val"):
        own = [text for text in texts if source.is_validation(text, 0.3) == (side == "val")]
        assert [text for of, batch in batches if of == side for text in batch] == own
    sizes = [sum(len(text.encode()) for text in batch) for _, batch in batches]
    assert max(sizes) < 1_000 + 310
    assert sum(size < 1_000 for size in sizes) <= 2  # the last of each side


def test_parquet_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{n:x}" * 20_000 for n in range(1, 800)]  # 40 MB in one row group
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_batch_size=8
    )
    size = path.stat().st_size
    assert size > 40_000_000
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for text, expected in zip(corpus.text_documents([path]), texts, strict=True):
        assert text == expected
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < size / 3


def test_how_much_of_the_text_trained_the_tokenizer_is_said(
    words: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(source.log, "info", lambda text, *values: lines.append(text % values))

    def said(limit: int) -> list[str]:
        lines.clear()
        monkeypatch.setattr(source, "TOKENIZER_BYTES", limit)
        source.from_text([words], 300, 0.2, tmp_path / str(limit))
        return [line for line in lines if "the tokenizer was trained" in line]

    (line,) = said(40_000)
    assert said(40_000) == []  # it is in the cache
    assert said(64_000_000) == []
    notes = json.loads(next((tmp_path / "40000").glob("*/notes.json")).read_text())
    assert line.startswith("data.files: the tokenizer was trained on the first 40,0")
    assert line.endswith(
        f" of {notes['train_bytes']:,} bytes of training text, in the order of its documents"
    )


def test_the_tokenizer_sees_no_more_than_its_share(monkeypatch: Patch) -> None:
    taken = source._FirstBytes(("x" * 10 for _ in range(100)), 95)
    assert len(list(taken)) == 10
    assert taken.num_bytes == 100
