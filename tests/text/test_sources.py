"""Text to shards: documents stay whole, the split is by content and holds."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qat.errors import UserError
from qat.text import corpus, source
from qat.text import source as hub
from qat.text.shards import TokenStream
from qat.text.tokenizer import BOS_ID, Tokenizer


def documents(prepared: source.Source, side: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    files = prepared.train_files if side == "train" else prepared.val_files
    stream = TokenStream(files, side)
    tokenizer, found, ids = Tokenizer(prepared.tokenizer), [], []
    for token in [*stream.take(0, len(stream)).tolist(), BOS_ID]:
        if token == BOS_ID and ids:
            found.append(tokenizer.decode(ids))
            ids = []
        elif token != BOS_ID:
            ids.append(token)
    return found


def test_the_embedded_bible(cache_dir: Path) -> None:
    chapters = corpus.web_bible()
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heavens and the earth.")
    assert chapters[-1].endswith("The grace of the Lord Jesus be with all the saints. Amen.")
    assert not any("`" in chapter for chapter in chapters)
    prepared = source.from_web_bible(1024, 0.05, cache_dir)
    train, val = documents(prepared, "train"), documents(prepared, "val")
    assert sorted(train + val) == sorted(chapters)
    assert not set(train) & set(val)
    share = sum(map(len, val)) / sum(map(len, chapters))
    assert 0.03 < share < 0.07
    assert prepared.notes["val_bytes"] == sum(len(text.encode()) for text in val)
    assert 1.5 < prepared.notes["val_xz_bits_per_byte"] < 3.0


def test_equal_documents_never_straddle_the_split(tmp_path: Path, cache_dir: Path) -> None:
    lines = [f"document {n % 300} of many, with some words in it" for n in range(900)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepared = source.from_text([str(path)], 290, 0.2, cache_dir)
    train, val = documents(prepared, "train"), documents(prepared, "val")
    assert sorted(train + val) == sorted(lines)
    assert val
    assert not set(train) & set(val)


def test_all_three_kinds_of_file_give_the_same_documents(tmp_path: Path, cache_dir: Path) -> None:
    texts = [f"line {n} of a small file" for n in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    from_json = source.from_text([str(tmp_path / "a.jsonl")], 290, 0.1, cache_dir)
    from_table = source.from_text([str(tmp_path / "a.parquet")], 290, 0.1, cache_dir)
    assert documents(from_json, "train") == documents(from_table, "train")
    assert from_json.identity != from_table.identity  # other bytes, other cache


def test_text_files_are_cut_into_passages_that_join_to_the_file(tmp_path: Path) -> None:
    text = ("A line of text, twelve words or so, that goes on.\r\n" * 40 + "\n") * 50
    text += "x" * 200_000
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    passages = list(corpus.text_documents([path]))
    assert "".join(passages) == text
    assert len(passages) >= 20
    longest = corpus.LONGEST_PASSAGE_BYTES + corpus.LONGEST_LINE_CHARS
    assert max(map(len, passages)) <= longest


def test_cache_is_by_content_and_not_by_path(tmp_path: Path, cache_dir: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"some words {n} again\n\n" for n in range(9000))
        )
    a = source.from_text([str(tmp_path / "one.txt")], 290, 0.3, cache_dir)
    b = source.from_text([str(tmp_path / "two.txt")], 290, 0.3, cache_dir)
    assert a == b
    (tmp_path / "two.txt").write_text("".join(f"other words {n} again\n\n" for n in range(9000)))
    assert source.from_text([str(tmp_path / "two.txt")], 290, 0.3, cache_dir) != a


def test_the_space_mark_in_a_text_stays_and_empty_texts_go(tmp_path: Path, cache_dir: Path) -> None:
    texts = [f"line {n}\u2581of \u2581 a small file\u2581" for n in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "", *texts[:3]])
    (tmp_path / "a.jsonl").write_text(lines)
    table = pyarrow.table({"text": [*texts, "", *texts[:3]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        prepared = source.from_text([str(tmp_path / name)], 290, 0.1, cache_dir)
        both = documents(prepared, "train") + documents(prepared, "val")
        assert sorted(both) == sorted([*texts, *texts[:3]])
        notes = prepared.notes
        assert notes["train_documents"] + notes["val_documents"] == 303
        assert notes["train_bytes"] + notes["val_bytes"] == sum(len(t.encode()) for t in both)


def test_tokens_that_count_other_bytes_than_the_text_stop_the_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As U+2581 would, if it were encoded like a space."""
    monkeypatch.setattr(
        Tokenizer,
        "encode_documents",
        lambda self, texts: [[BOS_ID, *self.pieces.encode(t)] for t in texts],
    )
    (tmp_path / "a.txt").write_text("words and\u2581words\n\n" * 9000)
    with pytest.raises(UserError, match=r"data=text: the tokens of the (train|val) side count \d+"):
        source.from_text([str(tmp_path / "a.txt")], 280, 0.3, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/notes.json"))


def test_shards_are_memory_mapped(cache_dir: Path) -> None:
    prepared = source.from_web_bible(1024, 0.05, cache_dir)
    import numpy as np

    assert all(isinstance(s, np.memmap) for s in TokenStream(prepared.train_files, "x")._shards)


def test_shards_with_another_tokenizer_are_refused(cache_dir: Path, tmp_path: Path) -> None:
    small = source.from_text([_words(tmp_path)], 300, 0.2, cache_dir)
    other = source.from_text([_words(tmp_path)], 290, 0.2, cache_dir)
    with pytest.raises(UserError, match="another tokenizer made the shards"):
        source.from_shards(None, str(small.val_files[0]), str(other.tokenizer))


def _words(folder: Path) -> str:
    path = folder / "w.txt"
    path.write_text("".join(f"{n} words and {n * 7} more of them.\n\n" for n in range(9000)))
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"txt": "x"}\n', "line 2"),
        ("a.jsonl", "not json\n", "line 1"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8"),
        ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("a.pdf", b"", "give .txt, .jsonl, .parquet"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_unreadable_text_is_named(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        source.from_text([str(path)], 300, 0.1, tmp_path / "cache")
    assert name in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/notes.json"))


def test_a_vocabulary_the_text_cannot_support_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab\n\n" * 3000)
    with pytest.raises(UserError, match=r"model.vocab_size = 5000"):
        source.from_text([str(tmp_path / "a.txt")], 5000, 0.3, tmp_path / "cache")


class _Hub:
    """Stands in for huggingface_hub: a listing, and files that are made when fetched."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.fetched = folder, names, []

    def fetch(self, repo_id: str, name: str, **_: object) -> str:
        self.fetched.append(name)
        return str(self.folder / Path(name).name)


def test_the_hub_gives_the_first_shards_in_name_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    base = "datasets/datasets/fineweb10B_sp1024"
    names = [f"{base}/fineweb_train_{n:06d}.bin" for n in range(5)]
    names += [f"{base}/fineweb_val_000000.bin", "datasets/tokenizers/fineweb_1024_bpe.model"]
    names += ["datasets/datasets/fineweb10B_sp4096/fineweb_train_000000.bin", "README.md"]
    fake = _Hub(tmp_path, names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.fetch)
    monkeypatch.setattr(hub, "_repository_files", lambda *a: sorted(names))
    found = hub.from_hub("some/repo", "main", "fineweb10B_sp1024", 3)
    assert [p.name for p in found.train_files] == [f"fineweb_train_{n:06d}.bin" for n in range(3)]
    assert found.tokenizer.name == "fineweb_1024_bpe.model"
    assert len(fake.fetched) == 5
    with pytest.raises(UserError, match=r"data.train_shards = 9: some/repo has only 5"):
        hub.from_hub("some/repo", "main", "fineweb10B_sp1024", 9)
    with pytest.raises(UserError, match="no such shards"):
        hub.from_hub("some/repo", "main", "fineweb10B_sp2048", 1)


def test_offline_the_hub_says_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="hf download some/repo --repo-type dataset") as caught:
        hub.from_hub("some/repo", "main", "fineweb10B_sp1024", 1)
    assert "\n" not in str(caught.value)


def test_equal_bytes_of_another_kind_are_other_documents(tmp_path: Path, cache_dir: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {n} of a file"}) + "\n" for n in range(30000))
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(lines)
    parsed = source.from_text([str(tmp_path / "a.jsonl")], 300, 0.2, cache_dir)
    raw = source.from_text([str(tmp_path / "a.txt")], 300, 0.2, cache_dir)
    assert documents(parsed, "train")[0].startswith("line ")
    assert documents(raw, "train")[0].startswith("{")
