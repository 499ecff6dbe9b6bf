"""Whether a split is what its score takes it for: bytes that add up, documents not trained on.

Every token is read once, in chunks, and cut into documents at BOS. Validation documents are indexed
by a 64-bit hash of their tokens: their own duplicates are found that way, and memory grows with
them only. Training documents are streamed past the index. Each equal hash is confirmed by comparing
the tokens themselves. Documents that are alike, but not equal, are not looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress

from qat.compiled import machine_code
from qat.text.byte_table import ByteTable
from qat.text.shards import TokenStream

CHUNK_TOKENS = 4_000_000
COMPARED_TOKENS = 1_000_000  # at a time, of documents of any length
NUM_IDS = 1 << 16  # of uint16 tokens
HASH_SEED, HASH_MULTIPLIER = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # any odd multiplier


@dataclass(frozen=True)
class StreamFacts:
    """Counts over one split. A document is what follows a BOS, which is not part of it."""

    num_tokens: int
    num_bytes: int  # of the text, by the byte table
    num_documents: int
    num_empty: int  # documents without a token
    longest_tokens: int
    num_unknown: int
    num_outside: int  # ids that the vocabulary does not have
    highest_id: int
    starts_with_bos: bool


@dataclass(frozen=True)
class Overlap:
    """Validation documents that are equal to a training document, token by token."""

    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class Audit:
    val: StreamFacts
    train: StreamFacts | None
    val_duplicates: int  # validation documents equal to an earlier one
    overlap: Overlap | None  # None without training text


@dataclass(frozen=True)
class _Documents:
    """Where documents lie in their stream, with hash and bytes; arrays of one length."""

    hashes: np.ndarray  # uint64
    starts: np.ndarray  # int64, of the first token after BOS
    lengths: np.ndarray  # int64, tokens
    num_bytes: np.ndarray  # int64


# Not numpy alone: a pass over memory for each operation, six times the time; numba is here for mix.
@machine_code
def _cut(tokens, start, bos_id, bytes_of, spaced, boundary, open_document, multiplier, out):
    """Cut a chunk that begins at position ``start`` of its stream into documents.

    ``open_document``: hash, start, bytes so far of the document in progress, and the token before;
    ``out``: (documents, 4) uint64 of those that end in this chunk. Returns how many do.
    """
    code, first, num_bytes = open_document[0], open_document[1], open_document[2]
    previous = open_document[3]
    found = 0
    for i in range(tokens.size):
        token = np.uint64(tokens[i])
        if token == bos_id:
            position = np.uint64(start + i)
            out[found, 0] = code
            out[found, 1] = first
            out[found, 2] = position - first
            out[found, 3] = num_bytes
            found += 1
            code, first, num_bytes = np.uint64(HASH_SEED), position + np.uint64(1), np.uint64(0)
        else:
            code = (code ^ token) * multiplier
            code ^= code >> np.uint64(32)
            num_bytes += np.uint64(bytes_of[token])
            if spaced[token] and not boundary[previous]:
                num_bytes += np.uint64(1)
        previous = token
    open_document[0], open_document[1], open_document[2] = code, first, num_bytes
    open_document[3] = previous
    return found


class _Reader:
    """One pass over a stream: its documents chunk by chunk, and afterwards its facts."""

    def __init__(self, stream: TokenStream, table: ByteTable, bos_id: int, unknown_id: int) -> None:
        self.stream, self.bos_id, self.unknown_id = stream, bos_id, unknown_id
        self.vocab_size = len(table.own_bytes)
        # Ids outside the vocabulary: no bytes, no space, no boundary.
        self.bytes_of, self.spaced, self.boundary = (
            np.pad(column.numpy(), (0, NUM_IDS - self.vocab_size))
            for column in (table.own_bytes, table.leads_with_space, table.is_boundary)
        )
        self.occurrences = np.zeros(NUM_IDS, np.int64)
        self.num_bytes = self.num_documents = self.num_empty = self.longest_tokens = 0

    def documents(self, progress: Progress, title: str) -> Iterator[_Documents]:
        """Documents that are not empty, in order; one that spans chunks comes with its last."""
        task = progress.add_task(title, total=len(self.stream))
        self.starts_with_bos = int(self.stream.take(0, 1)[0]) == self.bos_id
        # What is before the first token is nothing: if that is BOS, no document ends there.
        open_document = np.array([HASH_SEED, 0, 0, self.bos_id], np.uint64)
        start = 0
        for chunk in self.stream.chunks(CHUNK_TOKENS):
            self.occurrences += np.bincount(chunk, minlength=NUM_IDS)
            out = np.empty((int(np.count_nonzero(chunk == self.bos_id)), 4), np.uint64)
            _cut(
                chunk, start, np.uint64(self.bos_id), self.bytes_of, self.spaced, self.boundary,
                open_document, np.uint64(HASH_MULTIPLIER), out,
            )  # fmt: skip
            if start == 0 and self.starts_with_bos:
                out = out[1:]
            start += len(chunk)
            yield self._seen(out)
            progress.advance(task, len(chunk))
        code, first, num_bytes, _ = (int(value) for value in open_document)
        yield self._seen(np.array([[code, first, start - first, num_bytes]], np.uint64))

    def _seen(self, rows: np.ndarray) -> _Documents:
        hashes, rest = rows[:, 0], rows[:, 1:].astype(np.int64)
        starts, lengths, num_bytes = rest.T
        self.num_documents += len(rows)
        self.num_empty += int(np.count_nonzero(lengths == 0))
        self.num_bytes += int(num_bytes.sum())
        self.longest_tokens = max(self.longest_tokens, int(lengths.max(initial=0)))
        kept = lengths > 0
        return _Documents(hashes[kept], starts[kept], lengths[kept], num_bytes[kept])

    def facts(self) -> StreamFacts:
        return StreamFacts(
            num_tokens=len(self.stream),
            num_bytes=self.num_bytes,
            num_documents=self.num_documents,
            num_empty=self.num_empty,
            longest_tokens=self.longest_tokens,
            num_unknown=int(self.occurrences[self.unknown_id]),
            num_outside=int(self.occurrences[self.vocab_size :].sum()),
            highest_id=int(self.occurrences.nonzero()[0][-1]),
            starts_with_bos=self.starts_with_bos,
        )


class _Index:
    """Validation documents by hash; equal ones stand together behind the first of them."""

    def __init__(self, stream: TokenStream, documents: list[_Documents]) -> None:
        self.stream = stream
        joined = _joined(documents)
        order = np.argsort(joined.hashes, kind="stable")
        self.starts, self.lengths = joined.starts[order], joined.lengths[order]
        self.num_bytes = joined.num_bytes[order]
        self.hashes, self.group_starts, sizes = np.unique(
            joined.hashes[order], return_index=True, return_counts=True
        )
        self.first_equal = np.arange(len(order))
        for group in np.flatnonzero(sizes > 1):
            begin = int(self.group_starts[group])
            self._match_inside(range(begin, begin + int(sizes[group])))
        self.num_duplicates = int(np.count_nonzero(self.first_equal != np.arange(len(order))))
        self.is_found = np.zeros(len(order), bool)  # of firsts
        self._waiting: dict[int, list[int]] = {}  # per hash met, the firsts not found yet
        self._group_is_done = np.zeros(len(self.hashes), bool)

    def _match_inside(self, group: range) -> None:
        firsts: list[int] = []
        for document in group:
            equal = (first for first in firsts if self._is(document, self.stream, self._at(first)))
            self.first_equal[document] = first = next(equal, document)
            if first == document:
                firsts.append(document)

    def _at(self, document: int) -> tuple[int, int]:
        return int(self.starts[document]), int(self.lengths[document])

    def _is(self, document: int, stream: TokenStream, at: tuple[int, int]) -> bool:
        """Whether the ``length`` tokens of ``stream`` from ``start`` are those of a document."""
        ours, (start, length) = int(self.starts[document]), at
        return length == self.lengths[document] and all(
            np.array_equal(self.stream.take(ours + i, count), stream.take(start + i, count))
            for i in range(0, length, COMPARED_TOKENS)
            for count in [min(COMPARED_TOKENS, length - i)]
        )

    def look_up(self, stream: TokenStream, documents: _Documents) -> None:
        """Mark the validation documents that are among these of another stream."""
        if not len(self.hashes):
            return
        places = np.searchsorted(self.hashes, documents.hashes)
        places[places == len(self.hashes)] = 0
        is_hit = (self.hashes[places] == documents.hashes) & ~self._group_is_done[places]
        for hit in np.flatnonzero(is_hit):
            group = int(places[hit])
            waiting = self._waiting.setdefault(group, self._firsts(group))
            at = int(documents.starts[hit]), int(documents.lengths[hit])
            for document in waiting:
                if self._is(document, stream, at):
                    self.is_found[document] = True
                    waiting.remove(document)
                    break
            self._group_is_done[group] = not waiting

    def _firsts(self, group: int) -> list[int]:
        ends = [*self.group_starts[group + 1 : group + 2], len(self.first_equal)]
        members = range(int(self.group_starts[group]), int(ends[0]))
        return [member for member in members if self.first_equal[member] == member]

    def overlap(self) -> Overlap:
        found = self.is_found[self.first_equal]
        return Overlap(int(np.count_nonzero(found)), int(self.num_bytes[found].sum()))


def _joined(parts: list[_Documents]) -> _Documents:
    return _Documents(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("hashes", "starts", "lengths", "num_bytes")
        )
    )


def audit(
    val: TokenStream,
    train: TokenStream | None,
    table: ByteTable,
    bos_id: int,
    unknown_id: int,
    console: Console,
) -> Audit:
    """Read both splits (or the validation split alone); a progress bar on ``console``."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        reader = _Reader(val, table, bos_id, unknown_id)
        index = _Index(val, list(reader.documents(progress, "validation text")))
        val_facts = reader.facts()
        if train is None:
            return Audit(val_facts, None, index.num_duplicates, None)
        reader = _Reader(train, table, bos_id, unknown_id)
        for documents in reader.documents(progress, "training text"):
            index.look_up(train, documents)
        return Audit(val_facts, reader.facts(), index.num_duplicates, index.overlap())
