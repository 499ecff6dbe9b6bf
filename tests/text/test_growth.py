"""Any amount of text takes bounded memory; any number of processes makes the same shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qat.errors import UserError
from qat.text import corpus, encoding, source
from qat.text.encoding import SideTexts, encode_batches
from qat.text.tokenizer import Tokenizer

Patch = pytest.MonkeyPatch


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "w.jsonl"
    lines = (json.dumps({"text": f"{n} words, {n * 7} more \u2581 {n % 13}"}) for n in range(4000))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def tokenizer(words: str, cache_dir: Path) -> Tokenizer:
    return Tokenizer(source.from_text([words], 300, 0.2, cache_dir).tokenizer)


@pytest.fixture
def started(monkeypatch: Patch) -> list[encoding._Process]:
    """Processes as they start; two batches are worth some."""
    found: list[encoding._Process] = []

    class Counted(encoding._Process):
        def __init__(self, tokenizer: Path) -> None:
            super().__init__(tokenizer)
            found.append(self)

    monkeypatch.setattr(encoding, "_Process", Counted)
    monkeypatch.setattr(encoding, "FEW_BATCHES", 2)
    return found


def test_the_same_shards_whatever_the_number_of_processes(
    words: str, tmp_path: Path, started: list, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 5_000)
    found = []
    for processes in (1, 2, 3):
        monkeypatch.setattr(source, "num_processes", lambda n=processes: n)
        source.from_text([words], 300, 0.2, tmp_path / str(processes))
        (notes,) = (tmp_path / str(processes)).glob("*/notes.json")
        files = sorted(notes.parent.iterdir())
        found.append([(file.name, file.read_bytes()) for file in files])
    assert [name for name, _ in found[0]] == [
        "notes.json", "tokenizer.model", "train_000000.bin", "val_000000.bin",
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len(started) == 2 + 3
    assert all(process.program.poll() is not None for process in started)


def test_little_text_starts_no_process(
    words: str, tmp_path: Path, started: list, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(encoding, "FEW_BATCHES", 3)
    monkeypatch.setattr(source, "num_processes", lambda: 2)
    source.from_text([words], 300, 0.2, tmp_path)
    assert not started


@pytest.mark.parametrize("processes", [1, 2])
def test_few_batches_are_in_memory(tokenizer: Tokenizer, started: list, processes: int) -> None:
    taken = 0

    def batches() -> Iterator[SideTexts]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield SideTexts("train", [f"text {number}"])

    most = 0
    for done, (batch, _) in enumerate(encode_batches(tokenizer, batches(), processes)):
        assert batch.texts == [f"text {done}"]
        most = max(most, taken - done)
    assert taken == 60
    assert most <= encoding.FEW_BATCHES + encoding.AHEAD * processes
    assert len(started) == (processes if processes > 1 else 0)


def test_a_process_that_dies_is_one_line(tokenizer: Tokenizer, started: list) -> None:
    batches = (SideTexts("train", [f"text {number}"]) for number in range(60))
    encoded = encode_batches(tokenizer, batches, 2)
    next(encoded)
    started[0].program.kill()
    with pytest.raises(UserError, match="data: a process that turns text into tokens died"):
        list(encoded)
    assert all(process.program.poll() is not None for process in started)


def test_batches_hold_so_many_bytes_and_a_document_more(monkeypatch: Patch) -> None:
    monkeypatch.setattr(source, "BATCH_BYTES", 1_000)
    texts = [f"{n}" + "é" * 150 for n in range(2_000)]
    batches = list(source._batches(texts, 0.3))
    for side in ("train", "val"):
        own = [text for text in texts if source.is_validation(text, 0.3) == (side == "val")]
        assert [text for batch in batches if batch.side == side for text in batch.texts] == own
    sizes = [sum(len(text.encode()) for text in batch.texts) for batch in batches]
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
    assert line.startswith("data=text: the tokenizer was trained on the first 40,0")
    assert line.endswith(
        f" of {notes['train_bytes']:,} bytes of training text, in the order of its documents"
    )


def test_the_tokenizer_sees_no_more_than_its_share(monkeypatch: Patch) -> None:
    taken = source._FirstBytes(("x" * 10 for _ in range(100)), 95)
    assert len(list(taken)) == 10
    assert taken.num_bytes == 100
