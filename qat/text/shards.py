"""Token shards in the challenge's own format, written once and memory-mapped ever after.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) followed by uint16 tokens.
A stream is all shards of a split in name order, read as if they were one endless loop.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from qat.errors import UserError

MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
SHARD_TOKENS = 100_000_000
SCAN_TOKENS = 16_000_000
CACHED_TOKENS = 1_000_000  # what is looked at more than once stays in the processor's cache


class ShardWriter:
    """Writes tokens to ``<prefix>_000000.bin``, ``<prefix>_000001.bin``, ... of a folder."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.num_tokens = 0
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._index = 0

    def write(self, ids: ArrayLike) -> None:
        tokens = np.asarray(ids, dtype="<u2")
        self.num_tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                path = self.folder / f"{self.prefix}_{self._index:06d}.bin"
                self._file = open(path, "wb")  # noqa: SIM115  (closed by _finish_shard)
                self._file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [self.shard_tokens - self._in_shard])
            self._file.write(part.tobytes())
            self._in_shard += len(part)
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    def close(self) -> None:
        if self._file is not None:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._file is not None
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self._in_shard
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file, self._in_shard, self._index = None, 0, self._index + 1


def _open_shard(path: Path, setting: str) -> np.ndarray:
    """Tokens of one shard as a memory map; UserError names the file and what is wrong."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"{setting}: cannot read {path}: {error.strerror or error}") from None
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{setting}: {path} is not a token shard (wrong magic or version)")
    num_tokens = int(header[2])
    if num_tokens < 1 or size != HEADER_BYTES + 2 * num_tokens:
        raise UserError(
            f"{setting}: {path} has the wrong length: its header says {num_tokens} tokens, "
            f"the file holds {(size - HEADER_BYTES) / 2:g}; fetch it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def _chunks(path: Path, shard: np.ndarray, chunk_tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, len(shard), chunk_tokens):
        count = min(chunk_tokens, len(shard) - start)
        offset = HEADER_BYTES + start * shard.itemsize
        yield np.memmap(path, shard.dtype, "r", offset, (count,))


def _is_in(chunk: np.ndarray, wanted: np.ndarray) -> bool:
    found = np.flatnonzero(chunk[: max(0, len(chunk) - len(wanted) + 1)] == wanted[0])
    for place, token in enumerate(wanted):
        found = found[chunk[found + place] == token]
        if not len(found):
            return False
    return True


class TokenStream:
    """All shards of a split, joined in name order; reading wraps around at the end.

    ``setting`` is the name of the setting that chose the files, for error messages.
    """

    def __init__(self, paths: list[Path], setting: str) -> None:
        if not paths:
            raise UserError(f"{setting}: no shard found")
        self.paths, self.setting = sorted(paths), setting
        self._shards = [_open_shard(path, setting) for path in self.paths]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def check_ids(self, vocab_size: int) -> None:
        """UserError if any shard holds a token id outside the vocabulary (reads every token)."""
        for path, shard in zip(self.paths, self._shards, strict=True):
            for start in range(0, len(shard), SCAN_TOKENS):
                highest = int(shard[start : start + SCAN_TOKENS].max())
                if highest >= vocab_size:
                    raise UserError(
                        f"{self.setting}: {path} holds token id {highest}, but the vocabulary "
                        f"ends at {vocab_size - 1}; give the shards' own data.tokenizer"
                    )

    def chunks(self, chunk_tokens: int = SCAN_TOKENS) -> Iterator[np.ndarray]:
        """All tokens once, in order: uint16 arrays of at most ``chunk_tokens``, none across shards.

        Each is a memory map of its own, so that pages that were read can be forgotten.
        """
        for path, shard in zip(self.paths, self._shards, strict=True):
            yield from _chunks(path, shard, chunk_tokens)

    def count(self, token: int) -> int:
        """How often a token occurs (reads every token)."""
        return sum(int(np.count_nonzero(chunk == token)) for chunk in self.chunks())

    def find(self, token: int) -> np.ndarray:
        """Positions of a token in the stream, sorted, int64 (reads every token)."""
        found, start = [np.zeros(0, dtype=np.int64)], 0
        for chunk in self.chunks():
            found.append(np.flatnonzero(chunk == token) + start)
            start += len(chunk)
        return np.concatenate(found)

    def holds(self, passage: ArrayLike) -> bool:
        """Whether these tokens are in the stream: ``count_held`` of one passage."""
        return self.count_held([passage]) == 1

    def count_held(self, passages: Sequence[ArrayLike]) -> int:
        """How many of these passages are in the stream, one token after another (reads every token,
        once). Not found where they are cut: by the end of a shard, or of what is read at a time."""
        missing = [np.asarray(passage) for passage in passages]
        for chunk in self.chunks(CACHED_TOKENS):
            missing = [wanted for wanted in missing if not _is_in(chunk, wanted)]
            if not missing:
                break
        return len(passages) - len(missing)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each shard's tokens, by path (reads every token)."""
        digests = {}
        for path, shard in zip(self.paths, self._shards, strict=True):
            digest = hashlib.sha256()
            for chunk in _chunks(path, shard, SCAN_TOKENS):
                digest.update(chunk.data)
            digests[str(path.absolute())] = digest.hexdigest()
        return digests

    @property
    def fingerprint(self) -> str:
        """Hex hash of all tokens and how they are cut into shards, wherever these lie."""
        return hashlib.sha256("".join(self.digests.values()).encode()).hexdigest()

    def take(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from position ``start`` (modulo the length), as int64."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            position = (start + filled) % len(self)
            index = bisect_right(self._ends, position)
            offset = position - (self._ends[index - 1] if index else 0)
            part = self._shards[index][offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out
