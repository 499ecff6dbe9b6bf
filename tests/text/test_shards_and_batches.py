"""Shards in the challenge's format, and batches that depend on the step alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qat.errors import UserError
from qat.text.batches import BatchShape, TrainingBatches, drawn_token, micro_batch
from qat.text.shards import ShardWriter, TokenStream
from tests.conftest import GOLF


def write(folder: Path, tokens: list[int], shard_tokens: int) -> TokenStream:
    writer = ShardWriter(folder, "train", shard_tokens)
    for start in range(0, len(tokens), 7):
        writer.write(tokens[start : start + 7])
    writer.close()
    return TokenStream(list(folder.glob("train_*.bin")), "data.train_files")


def test_written_shards_read_back_across_borders_and_around_the_end(tmp_path: Path) -> None:
    tokens = list(range(100, 1130))
    stream = write(tmp_path, tokens, 256)
    assert len(stream.paths) == 5
    assert len(stream) == len(tokens)
    endless = np.array(tokens * 3)
    for start, count in ((0, 10), (250, 20), (0, 1030), (1020, 40), (1029, 1031), (2060, 5)):
        assert np.array_equal(stream.take(start, count), endless[start % 1030 :][:count])


def test_header_is_the_challenges(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3], 100)
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<4i", raw[:16]) == (20240520, 1, 3, 0)
    assert raw[1024:] == struct.pack("<3H", 1, 2, 3)
    assert len(TokenStream([GOLF / "fineweb_val_000000.bin"], "data.val_files")) == 67_755


def damage(folder: Path, edit) -> Path:
    raw = bytearray((GOLF / "fineweb_val_000000.bin").read_bytes())
    path = folder / "shard.bin"
    path.write_bytes(bytes(edit(raw) or raw))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.__setitem__(0, 0), "wrong magic"),
        (lambda raw: raw.__setitem__(4, 9), "wrong magic or version"),
        (lambda raw: raw[:-2], "wrong length"),
        (lambda raw: raw + b"xx", "wrong length"),
        (lambda raw: raw[:100], "wrong magic"),
        (lambda raw: raw.__setitem__(slice(8, 12), b"\0\0\0\0"), "wrong length"),
    ],
)
def test_corrupt_shards_are_named(edit, message: str, tmp_path: Path) -> None:
    path = damage(tmp_path, edit)
    with pytest.raises(UserError, match=message) as caught:
        TokenStream([path], "data.val_files")
    assert str(path) in str(caught.value)


def test_a_token_outside_the_vocabulary_is_found(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda raw: raw.__setitem__(slice(5000, 5002), b"\x00\x02"))
    stream = TokenStream([path], "data.val_files")
    with pytest.raises(UserError, match="token id 512"):
        stream.check_ids(512)
    stream.check_ids(513)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return write(tmp_path, list(np.random.default_rng(0).integers(0, 999, 5000)), 700)


def test_a_step_takes_the_next_batch_tokens_plus_one(stream: TokenStream) -> None:
    shape = BatchShape(batch_tokens=64, seq_len=16)
    for step in (0, 1, 2, 77, 200):
        span = stream.take(step * 65, 65)
        x, y = micro_batch(stream, shape, step, 0, 0)
        assert np.array_equal(x.flatten(), span[:-1])
        assert np.array_equal(y.flatten(), span[1:])
        assert x.shape == (4, 16)


def test_reading_begins_where_a_seed_draws_it(stream: TokenStream) -> None:
    """And goes on at the first token after the last."""
    assert drawn_token(stream, None) == 0
    places = {drawn_token(stream, seed) for seed in range(20)}
    assert len(places) == 20
    assert all(0 <= place < len(stream) for place in places)
    shape = BatchShape(batch_tokens=64, seq_len=16, first_token=4990)
    x, _ = micro_batch(stream, shape, 0, 0, 0)
    assert np.array_equal(x.flatten()[:20], [*stream.take(4990, 10), *stream.take(0, 10)])
    x, _ = micro_batch(stream, shape, 3, 0, 0)
    assert np.array_equal(x.flatten(), stream.take(4990 + 3 * 65 - 5000, 64))


@pytest.mark.parametrize(("ranks", "micros"), [(1, 4), (2, 1), (2, 2), (4, 1), (8, 2)])
def test_ranks_and_micro_batches_slice_the_same_span(
    stream: TokenStream, ranks: int, micros: int
) -> None:
    whole, _ = micro_batch(stream, BatchShape(256, 16), 3, 0, 0)
    shape = BatchShape(256, 16, ranks, micros)
    pieces = [micro_batch(stream, shape, 3, r, m)[0] for m in range(micros) for r in range(ranks)]
    assert torch.equal(torch.cat(pieces), whole)


def test_priming_steps_come_first_and_change_nothing_after(stream: TokenStream) -> None:
    shape = BatchShape(64, 16, 1, 2)
    plain, primed = iter(TrainingBatches(stream, shape, 0, 0)), None
    primed = iter(TrainingBatches(stream, shape, 0, priming_steps=3))
    for _ in range(3 * shape.micro_batches):
        next(primed)
    for _ in range(10):
        assert torch.equal(next(primed)[0], next(plain)[0])


def test_a_worker_that_reads_ahead_gives_the_same_batches(stream: TokenStream) -> None:
    """As on a GPU, where a step must never wait for a disk."""
    batches = TrainingBatches(stream, BatchShape(64, 16, 2, 2), rank=1, priming_steps=1)
    ahead = iter(DataLoader(batches, batch_size=None, num_workers=1))
    for batch, _ in zip(batches, range(10), strict=False):
        for ours, read in zip(batch, next(ahead), strict=True):
            assert torch.equal(ours, read)
