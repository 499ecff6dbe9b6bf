"""Text to shards: documents stay whole, the split is by content and holds."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from qat.errors import UserError
from qat.text import corpus, source
from qat.text import source as hub
from qat.text import tokenizer as tokenizers
from qat.text.byte_table import SPACE
from qat.text.shards import ShardWriter, TokenStream
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


def test_verses_know_their_book() -> None:
    verses = corpus.bible_verses()
    counts = Counter(book for book, _ in verses)
    assert len(verses) == 31_102
    assert list(counts) == list(range(66))
    assert (counts[0], counts[62], counts[18]) == (1533, 13, 2461)  # Genesis, 2 John, Psalms
    assert verses[0] == (0, "In the beginning God created the heavens and the earth.")
    assert "Jesus wept." in [text for book, text in verses if book == 42]
    whole = " ".join(" ".join(corpus.web_bible()).split())
    assert all(text in whole for _, text in verses[::500])


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


def test_a_cache_whose_parent_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"some words {n} again\n\n" for n in range(900)))
    with pytest.raises(UserError, match=r"^data.cache_dir=/proc/none/cache: cannot write there \("):
        source.from_text([str(tmp_path / "a.txt")], 290, 0.3, Path("/proc/none/cache"))


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
    with pytest.raises(
        UserError, match=r"data\.files: the tokens of the (train|val) side count \d+"
    ):
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
    """And what is named as the smallest and the largest one works."""
    (tmp_path / "a.txt").write_text("ab ab ab\n\n" * 3000)

    def prepare(vocab_size: int) -> source.Source:
        return source.from_text([str(tmp_path / "a.txt")], vocab_size, 0.3, tmp_path / "cache")

    for asked, said in ((5000, r"at most; give model.vocab_size=(\d+) or less"),
                        (2, r"the smallest vocabulary for text has (\d+) pieces")):  # fmt: skip
        with pytest.raises(UserError, match=f"^model.vocab_size = {asked}: .*{said}") as caught:
            prepare(asked)
        found = re.search(said, str(caught.value))
        assert found
        assert Tokenizer(prepare(int(found[1])).tokenizer).vocab_size == int(found[1])


def test_a_very_long_document_trains_the_vocabulary_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SentencePiece leaves out texts beyond a length, and says nothing."""
    monkeypatch.setattr(tokenizers, "LONGEST_BYTES", 4_000)
    path = tmp_path / "t.model"
    made, _ = tokenizers.train_tokenizer(["once", "many words " * 2_000], 270, path)
    assert len(made.pieces.encode("many")) < 3


def test_rare_characters_are_spelled_in_bytes_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More characters than pieces, of which a few are frequent."""
    said: list[str] = []
    monkeypatch.setattr(source.log, "info", lambda text, *values: said.append(text % values))
    many = [chr(0x4E00 + n) for n in range(600)]
    lines = [f"the same few words again {char} and {n}" for n, char in enumerate(many)] * 3
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text)
    for vocab_size in (280, 400):
        made = source.from_text(
            [str(tmp_path / "a.jsonl")], vocab_size, 0.2, tmp_path / str(vocab_size)
        )
        tokenizer, notes = Tokenizer(made.tokenizer), made.notes
        own = {
            piece
            for piece in map(tokenizer.pieces.id_to_piece, range(vocab_size))
            if len(piece) == 1 and piece != SPACE
        }
        characters = {char for line in documents(made, "train") for char in line} - {" "}
        assert (notes["characters"], notes["byte_characters"]) == (
            len(characters), len(characters - own)
        )  # fmt: skip
        assert 0 < len(own) <= (vocab_size - 260) // 2
        assert sorted(documents(made, "train") + documents(made, "val")) == sorted(lines)
        assert said[-1] == (
            f"data.files: {len(characters - own)} of {len(characters)} characters, "
            f"{100 * notes['byte_characters_share']:.2g} % of the text, are rare and spelled in "
            "bytes"
        )


@pytest.mark.parametrize("name", ["A.TXT", "a.txt.gz", "a.TXT.zst", "a.jsonl.gz", "A.JSONL.ZST"])
def test_files_as_people_have_them(name: str, tmp_path: Path) -> None:
    """Upper case, a byte order mark, compressed in two parts; cut off it is no text."""
    lines = [f"line {n} of a f\u00efle" for n in range(3000)]
    if ".txt" in name.lower():
        text, expected = "\n".join(lines), "\n".join(lines)
    else:
        text, expected = "\n".join(json.dumps({"text": t}) for t in lines), "".join(lines)
    raw = b"\xef\xbb\xbf" + text.encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        Path(name).suffix.lower()
    )
    whole = raw if compress is None else compress(raw[:50_000]) + compress(raw[50_000:])
    path = tmp_path / name
    path.write_bytes(whole)
    corpus.check_files([path])
    assert "".join(corpus.text_documents([path])) == expected
    if compress is not None:
        for damaged in (whole[:-9], b"not " + whole):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"data.files: cannot read .*{name}: ") as caught:
                list(corpus.text_documents([path]))
            assert "\n" not in str(caught.value)


def _table(folder: Path, column: str, values: list, kind: pyarrow.DataType | None = None) -> Path:
    path = folder / "a.parquet"
    table = pyarrow.table({"id": range(len(values)), column: pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, path)
    return path


def test_columns_of_other_names_and_types(tmp_path: Path) -> None:
    texts = ["one f\u00efle", "two"]
    for values, kind in (
        (texts, pyarrow.large_string()),
        ([text.encode() for text in texts], pyarrow.binary()),
        (texts, pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
    ):
        path = _table(tmp_path, "content", values, kind)
        assert list(corpus.text_documents([path], "content")) == texts
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    assert list(corpus.text_documents([lines], "content")) == texts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, "b"], "a.parquet, row 2: 'text' is null; take such rows out"),
        ([1, 2], "a.parquet, row 1: 'text' is of type int, not text"),
        ([["a"], ["b"]], "a.parquet, row 1: 'text' is of type list, not text"),
        ([b"good", b"\xff"], "a.parquet, row 2: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_rows_that_are_no_text_are_named(values: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(corpus.text_documents([_table(tmp_path, "text", values)]))


def test_a_fault_late_in_a_file_is_named_by_its_line(tmp_path: Path, cache_dir: Path) -> None:
    """Not blamed on the vocabulary, which is being made when it is read."""
    good = [json.dumps({"text": f"line {n} of many"}) for n in range(5000)]
    for name, bad, message in (
        ("a.jsonl", '{"text": null}', "line 3001: 'text' is null"),
        ("a.jsonl", '{"content": "x"}', "line 3001: no 'text', but content; name the text by"),
        ("a.jsonl", '{"text": 5}', "line 3001: 'text' is of type int"),
        ("a.jsonl", "[1]", "line 3001: not a JSON object"),
        ("a.jsonl", '{"text": "x"', r"line 3001: not JSON \(Expecting"),
        ("a.jsonl", '{"text": "x\udcff"}', r"line 3001: not UTF-8 text \(byte 0xff\)"),
        ("a.txt", "\udcfe", r"line 3001: not UTF-8 text \(byte 0xfe\)$"),
    ):
        lines = "\n".join([*good[:3000], bad, *good[3000:]])
        (tmp_path / name).write_bytes(lines.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=f"^data.files: .*{name}, {message}"):
            source.from_text([str(tmp_path / name)], 300, 0.2, cache_dir)
    (tmp_path / "a.txt").write_text("\n".join(good), encoding="utf-16")
    with pytest.raises(UserError, match=r"line 1: not UTF-8 text \(byte 0xff\); save it as UTF-8"):
        source.from_text([str(tmp_path / "a.txt")], 300, 0.2, cache_dir)


def test_a_file_that_two_globs_match_is_read_once(tmp_path: Path, cache_dir: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(Path(_words(tmp_path)).read_text() + name)
    (tmp_path / "w.txt").unlink()
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    once = source.from_text([str(tmp_path / f"{n}.txt") for n in "ab"], 300, 0.2, cache_dir)
    globs = [str(tmp_path / "[ab].txt"), str(tmp_path / "*.txt")]
    assert source.from_text(globs, 300, 0.2, cache_dir) == once


def test_two_files_with_the_same_text_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(Path(_words(tmp_path)).read_text())
    with pytest.raises(UserError, match=r"data.files: .*a.txt and .*b.txt hold the same text"):
        source.from_text([str(tmp_path / n) for n in ("a.txt", "b.txt")], 300, 0.2, cache_dir)


def _shard(path: Path, tokens: range) -> None:
    writer = ShardWriter(path.parent, "made")
    writer.write(list(tokens))
    writer.close()
    (path.parent / "made_000000.bin").rename(path)


def _tokenizer(folder: Path, cache_dir: Path) -> str:
    return str(source.from_text([_words(folder)], 300, 0.2, cache_dir).tokenizer)


def test_counts_of_bytes_beside_shards_are_no_tokens(
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The challenge's sidecars have a shard's header, and a glob matches both."""
    monkeypatch.setattr(source.log, "disabled", True)  # as Hydra does it
    for name, tokens in (
        ("fineweb_val_000000", range(50, 99)),
        ("fineweb_val_000001", range(50, 90)),
        ("fineweb_val_bytes_000000", range(9)),
    ):
        _shard(tmp_path / f"{name}.bin", tokens)
    tokenizer = _tokenizer(tmp_path, cache_dir)
    found = source.from_shards(None, str(tmp_path / "fineweb_val_*.bin"), tokenizer)
    assert [path.name for path in found.val_files] == [
        "fineweb_val_000000.bin", "fineweb_val_000001.bin"
    ]  # fmt: skip
    assert "fineweb_val_bytes_000000.bin not read: bytes of each token" in capsys.readouterr().err
    with pytest.raises(UserError, match="no tokens among these files; name the shards"):
        source.from_shards(None, str(tmp_path / "fineweb_val_bytes_*.bin"), tokenizer)
    (tmp_path / "fineweb_val_000000.bin").unlink()
    for more in ("fineweb_val_bytes_000000", "fineweb_train_000000"):
        _shard(tmp_path / f"{more}.bin", range(9))
        with pytest.raises(UserError, match=r"data\.val_files=.*: shards of 2 kinds, fineweb_"):
            source.from_shards(None, str(tmp_path / "*.bin"), tokenizer)
        (tmp_path / f"{more}.bin").unlink()


def test_validation_text_that_is_training_text_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "train_000000.bin", range(50, 90))
    _shard(tmp_path / "val_000000.bin", range(51, 91))
    _shard(tmp_path / "copy_000000.bin", range(50, 90))
    (tmp_path / "link_000000.bin").symlink_to(tmp_path / "train_000000.bin")
    train, tokenizer = str(tmp_path / "train_*.bin"), _tokenizer(tmp_path, cache_dir)
    source.from_shards(train, str(tmp_path / "val_*.bin"), tokenizer)
    for name in ("train", "link", "copy"):
        with pytest.raises(
            UserError, match=rf"data\.val_files=.*: {name}_000000\.bin is training text too"
        ):
            source.from_shards(train, str(tmp_path / f"{name}_*.bin"), tokenizer)


def test_less_training_text_than_a_step_takes_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "train_000000.bin", range(50, 115))
    _shard(tmp_path / "val_000000.bin", range(50, 99))
    globs = [str(tmp_path / f"{side}_*.bin") for side in ("train", "val")]
    found = source.from_shards(*globs, _tokenizer(tmp_path, cache_dir))
    stream = TokenStream(found.train_files, "data.train_files")
    source.check_length(found, stream, 64)
    with pytest.raises(UserError, match=r"^data\.train_files: 65 training tokens, fewer than the"):
        source.check_length(found, stream, 65)


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
