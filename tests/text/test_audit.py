"""The audit against a plain reading of the same tokens, and every fault it is there to find."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qat.text import audit as audit_module
from qat.text.audit import Audit, StreamFacts, audit
from qat.text.byte_table import ByteTable
from qat.text.shards import ShardWriter, TokenStream
from qat.text.source import from_text
from qat.text.tokenizer import BOS_ID, Tokenizer
from tests.conftest import GOLF, Done

UNKNOWN, VOCAB = 0, 6  # ids: unknown, BOS, 2 bytes, a space and 1 byte, a space, 3 bytes
TABLE = ByteTable(
    torch.tensor([0, 0, 2, 1, 0, 3]),
    torch.tensor([False, False, False, True, True, False]),
    torch.tensor([True, True, False, False, False, False]),
)
Tokens = list[int]


def stream(folder: Path, name: str, tokens: Tokens, shard_tokens: int) -> TokenStream:
    writer = ShardWriter(folder, name, shard_tokens)
    writer.write(tokens)
    writer.close()
    return TokenStream(list(folder.glob(f"{name}_*.bin")), f"data.{name}_files")


def documents_of(tokens: Tokens) -> list[tuple[int, ...]]:
    """Cut at BOS by hand; what is before the first BOS is a document if there is something."""
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == BOS_ID:
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(document) for document in (found if tokens[0] != BOS_ID else found[1:])]


def bytes_of(document: tuple[int, ...]) -> int:
    total, at_boundary = 0, True
    for token in document:
        own, leads, boundary = (
            (
                int(column[token])
                for column in (TABLE.own_bytes, TABLE.leads_with_space, TABLE.is_boundary)
            )
            if token < VOCAB
            else (0, 0, 0)
        )
        total += own + (leads and not at_boundary)
        at_boundary = bool(boundary)
    return total


def expected_facts(tokens: Tokens) -> StreamFacts:
    documents = documents_of(tokens)
    return StreamFacts(
        num_tokens=len(tokens),
        num_bytes=sum(map(bytes_of, documents)),
        num_documents=len(documents),
        num_empty=documents.count(()),
        longest_tokens=max(map(len, documents)),
        num_unknown=tokens.count(UNKNOWN),
        num_outside=sum(token >= VOCAB for token in tokens),
        highest_id=max(tokens),
        starts_with_bos=tokens[0] == BOS_ID,
    )


def check(val: Tokens, train: Tokens | None, shard_tokens: int) -> Audit:
    """Audit, and compare with sets of tuples."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = audit(
            stream(folder, "val", val, shard_tokens),
            None if train is None else stream(folder, "train", train, shard_tokens),
            TABLE,
            BOS_ID,
            UNKNOWN,
            Console(stderr=True),
        )
    assert found.val == expected_facts(val)
    texts = [document for document in documents_of(val) if document]
    assert found.val_duplicates == len(texts) - len(set(texts))
    if train is None:
        assert found.train is None
        assert found.overlap is None
        return found
    assert found.train == expected_facts(train)
    trained_on = set(documents_of(train))
    shared = [document for document in texts if document in trained_on]
    assert found.overlap is not None
    assert found.overlap.num_documents == len(shared)
    assert found.overlap.num_bytes == sum(map(bytes_of, shared))
    return found


few_documents = st.lists(st.lists(st.integers(2, 4), max_size=4), max_size=12)
some_tokens = st.lists(st.integers(0, 8), min_size=1, max_size=60)


def joined(documents: list[list[int]]) -> Tokens:
    return [token for document in documents for token in [BOS_ID, *document]] or [BOS_ID]


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [audit_module.HASH_MULTIPLIER, 0, 1 << 40])
@given(
    val=few_documents.map(joined) | some_tokens,
    train=st.none() | few_documents.map(joined) | some_tokens,
    shard_tokens=st.integers(1, 70),
    chunk_tokens=st.integers(1, 70),
)
def test_equal_to_sets_of_tuples(
    multiplier: int, val: Tokens, train: Tokens | None, shard_tokens: int, chunk_tokens: int
) -> None:
    """Documents across shards and chunks; with a multiplier of 0 every hash is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "HASH_MULTIPLIER", multiplier)
        patch.setattr(audit_module, "CHUNK_TOKENS", chunk_tokens)
        patch.setattr(audit_module, "COMPARED_TOKENS", 2)
        check(val, train, shard_tokens)


def test_many_documents_of_all_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "CHUNK_TOKENS", 5_000)
    random = np.random.default_rng(0)
    documents = [random.integers(2, 65_536, random.integers(0, 90)).tolist() for _ in range(900)]
    val = joined(documents[:300] + documents[100:110])
    found = check(val, joined(documents[280:] + documents[290:295]), 9_999)
    assert found.overlap is not None
    assert 15 <= found.overlap.num_documents <= 20
    assert found.val_duplicates >= 8


def test_hashes_tell_documents_apart() -> None:
    """Without this every lookup would end in a comparison: right, but slow."""
    with TemporaryDirectory() as name:
        every_pair = joined([[a, b] for a in range(2, 200) for b in range(2, 200)])
        one = stream(Path(name), "val", every_pair, 10**6)
        reader = audit_module._Reader(one, TABLE, BOS_ID, UNKNOWN)
        with audit_module.Progress(disable=True) as progress:
            hashes = np.concatenate([part.hashes for part in reader.documents(progress, "")])
    assert len(np.unique(hashes)) == 198**2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A folder with sound shards, a tokenizer and notes."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"Document {n} of a few, with {n * n} words\tin it.\n" for n in range(300)]
    texts = [*lines, "a\u2581b", "  spaced  ", ""]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = from_text([str(folder / "a.jsonl")], 300, 0.2, cache_dir)
    return source.tokenizer.parent


def shard_of(path: Path, edit: Callable[[Tokens, Tokenizer], Tokens]) -> None:
    """Write a shard again, its tokens edited."""
    one = TokenStream([path], "data")
    tokens = edit(one.take(0, len(one)).tolist(), Tokenizer(path.parent / "tokenizer.model"))
    writer = ShardWriter(path.parent, path.name.split("_")[0])
    writer.write(tokens)
    writer.close()


def named(folder: Path) -> list[str]:
    return [
        "task=audit", f"data.val_files={folder}/val_*.bin",
        f"data.train_files={folder}/train_*.bin", f"data.tokenizer={folder}/tokenizer.model",
    ]  # fmt: skip


def verdict(done: Done) -> str:
    return done.out.splitlines()[-1]


def test_sound_shards(prepared: Path, program: Callable[..., Done]) -> None:
    done = program("eval.py", *named(prepared))
    assert done.code == 0, done.out + done.err
    assert done.err == ""
    assert verdict(done) == "verdict: sound"
    notes = json.loads((prepared / "notes.json").read_text())
    for key in ("bytes", "tokens", "documents"):
        row = next(line for line in done.out.splitlines() if line.startswith(key))
        assert row.split()[-2:] == [f"{notes[f'{side}_{key}']:,}" for side in ("val", "train")]


def test_of_a_source_that_is_prepared(
    program: Callable[..., Done], prepared: Path, finished: Path, tiny: list[str], cache_dir: Path
) -> None:
    where = f"data.cache_dir={cache_dir}"
    for arguments in ((f"run={finished}",), (tiny[-2], "model.vocab_size=320")):
        done = program("eval.py", "task=audit", where, *arguments)
        assert (done.code, verdict(done)) == (0, "verdict: sound"), done.out + done.err
        assert "unknown" not in done.out.split("bytes, as prepared")[1]


def test_validation_alone(prepared: Path, program: Callable[..., Done]) -> None:
    done = program("eval.py", *(a for a in named(prepared) if "train_files" not in a))
    assert (done.code, verdict(done)) == (0, "verdict: sound")
    assert "not checked: no training text is named" in done.out


def leak(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    more = TokenStream([tokenizer.path.parent / "val_000000.bin"], "data")
    ends = [i for i, token in enumerate(more.take(0, len(more))) if token == BOS_ID]
    return tokens + more.take(0, ends[3]).tolist()


@pytest.mark.parametrize(
    ("side", "edit", "fault"),
    [
        ("train", leak, r"3 of \d+ validation documents are in the training text"),
        ("val", lambda t, _: t[1:], "the val tokens do not start with BOS"),
        ("train", lambda t, _: t[1:], "the train tokens do not start with BOS"),
        ("val", lambda t, _: [*t, 300, 7000], "2 val tokens are outside .* ends at 299 .*id 7000"),
        ("train", lambda t, z: [*t, z.pieces.unk_id()], "1 train tokens are unknown"),
        ("val", lambda t, _: [BOS_ID] * 9, "the val tokens stand for no bytes"),
    ],
)
def test_planted_faults(
    side: str, edit: Callable, fault: str, prepared: Path, program: Callable[..., Done],
    tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(prepared, tmp_path / "s")
    shard_of(tmp_path / "s" / f"{side}_000000.bin", edit)
    done = program("eval.py", *named(tmp_path / "s"))
    assert done.code == 2
    assert len([line for line in done.out.splitlines() if line.startswith("FAULT  ")]) == 1
    assert re.match(f"verdict: NOT SOUND: {fault}", verdict(done)), done.out


def test_bytes_that_are_not_the_texts(
    program: Callable[..., Done], tmp_path: Path, finished: Path, prepared_text: Path
) -> None:
    """Notes say what was prepared; shards that changed since do not count the same."""
    copy = tmp_path / "cache" / prepared_text.name
    shutil.copytree(prepared_text, copy)
    notes = copy / "notes.json"
    found = json.loads(notes.read_text())
    notes.write_text(json.dumps(found | {"val_bytes": found["val_bytes"] + 1}))
    done = program("eval.py", "task=audit", f"run={finished}", "data.cache_dir=cache")
    assert done.code == 2
    assert "FAULT  the val tokens count " in done.out


def test_the_challenges_tokenizer_normalises(program: Callable[..., Done]) -> None:
    done = program(
        "eval.py", "task=audit", f"data.val_files={GOLF}/fineweb_val_*.bin",
        f"data.train_files={GOLF}/fineweb_train_*.bin", f"data.tokenizer={GOLF}/tokenizer.model",
    )  # fmt: skip
    assert done.code == 2
    assert verdict(done).endswith("bytes of the normalised text")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "data = from_artifact: name the data: data.val_files=GLOB data.tokenizer=PATH, "),
        (("data.val_files=*.bin",), "data.tokenizer is missing: "),
        (("data.train_files=*.bin",), "data.val_files is missing: "),
        (("artifact=a.qat", "run=."), "artifact = a.qat: give artifact=PATH or run=RUN"),
        (("data=web_bible", "model.vocab_size=1"), "model.vocab_size = 1: give 260 to "),
        (("data=text",), "data=text: give data.files="),
    ],
)
def test_mistakes(arguments: tuple[str, ...], line: str, program: Callable[..., Done]) -> None:
    done = program("eval.py", "task=audit", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"error: {line}")
    assert len(done.err.splitlines()) == 1
