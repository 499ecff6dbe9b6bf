"""Which tokens the model sees, and which of them are scored, in every forward pass of a score.

Token t of a stream of n is predicted at input position t - 1, so there are n - 1 targets. A window
is a run of input positions; the last ``tail`` of its targets are scored. Without a stride windows
of ``seq_len`` do not overlap and the incomplete last one is dropped, as in the challenge's
baseline. With a stride the first window scores all it sees and every later one its last ``stride``
targets, the last one those that are left, so each target is scored exactly once, and all but the
first ``seq_len - stride`` with at least ``seq_len - stride`` tokens before them. By document, each
document (from its BOS to the next) is such a stream of its own and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qat.text.shards import TokenStream


@dataclass(frozen=True)
class Windows:
    """Arrays (W,), int64: first input position, number of inputs, number of scored targets."""

    starts: np.ndarray
    lengths: np.ndarray
    tails: np.ndarray

    @property
    def num_targets(self) -> int:
        return int(self.tails.sum())

    def positions(self) -> np.ndarray:
        """Input positions of the scored targets, sorted, (N,) int64."""
        before = np.cumsum(self.tails) - self.tails
        firsts = self.starts + self.lengths - self.tails
        return np.sort(np.repeat(firsts - before, self.tails) + np.arange(self.num_targets))

    def spread(self, max_targets: int) -> Windows:
        """About so many targets, in windows taken evenly from all (at least one)."""
        if self.num_targets <= max_targets:
            return self
        count = max(1, len(self.starts) * max_targets // self.num_targets)
        chosen = np.arange(count) * len(self.starts) // count
        return Windows(self.starts[chosen], self.lengths[chosen], self.tails[chosen])

    def holding(self, needed: np.ndarray) -> Windows:
        """Those with a scored target for which ``needed``, by input position, is true."""
        before = np.append(0, np.cumsum(needed))
        ends = self.starts + self.lengths
        chosen = before[ends] > before[ends - self.tails]
        return Windows(self.starts[chosen], self.lengths[chosen], self.tails[chosen])

    def batches(self, batch_tokens: int) -> list[Windows]:
        """Windows for one forward pass each, at most ``batch_tokens`` padded inputs.

        Windows that score all they see are not mixed with those that score their tail only, and
        the longest come first, so that little is padded.
        """
        is_whole = self.tails == self.lengths
        batches: list[Windows] = []
        for group in (np.flatnonzero(is_whole), np.flatnonzero(~is_whole)):
            group = group[np.argsort(-self.tails[group], kind="stable")]
            first = 0
            while first < len(group):
                rows = max(1, batch_tokens // int(self.lengths[group[first]]))
                chosen = group[first : first + rows]
                batches.append(
                    Windows(self.starts[chosen], self.lengths[chosen], self.tails[chosen])
                )
                first += rows
        return batches


@dataclass(frozen=True)
class Batch:
    """One forward pass: padded inputs ``ids`` (B, T), whose last ``tail`` columns are needed.

    ``targets`` and ``positions`` (input positions in the stream) are those scored, ``rows`` and
    ``columns`` where they stand among the needed ones; (N,) int64 each. ``tail`` None = all.
    """

    ids: Tensor
    tail: int | None
    rows: Tensor
    columns: Tensor
    positions: Tensor
    previous: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.ids.to(device),
            self.tail,
            self.rows.to(device),
            self.columns.to(device),
            self.positions.to(device),
            self.previous.to(device),
            self.targets.to(device),
        )


def stream_windows(num_tokens: int, seq_len: int, stride: int | None) -> Windows:
    """Windows over a stream; none if it is shorter than one window."""
    num_targets = num_tokens - 1
    if num_targets < seq_len:
        return Windows(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    if stride is None:
        starts = np.arange(num_targets // seq_len, dtype=np.int64) * seq_len
        sizes = np.full(len(starts), seq_len, dtype=np.int64)
        return Windows(starts, sizes, sizes)
    return _overlapping(
        np.zeros(1, dtype=np.int64), np.array([num_targets], dtype=np.int64), seq_len, stride
    )


def document_windows(
    document_starts: np.ndarray, num_tokens: int, seq_len: int, stride: int | None
) -> Windows:
    """Windows inside documents, which start at ``document_starts`` (sorted, the first is 0)."""
    ends = np.append(document_starts[1:], num_tokens - 1)
    has_targets = ends > document_starts  # the last document may be a BOS that predicts nothing
    starts = document_starts[has_targets]
    return _overlapping(starts, ends[has_targets] - starts, seq_len, stride or seq_len)


def _overlapping(starts: np.ndarray, num_targets: np.ndarray, seq_len: int, stride: int) -> Windows:
    """Sliding windows inside spans of ``num_targets`` targets each."""
    first = np.minimum(num_targets, seq_len)
    later = -(-(num_targets - first) // stride)  # windows after the first, per span
    span = np.repeat(np.arange(len(starts)), later)
    nth = np.arange(later.sum()) - np.repeat(np.cumsum(later) - later, later)
    scored_from = seq_len + nth * stride
    tails = np.minimum(stride, num_targets[span] - scored_from)
    window_starts = starts[span] + scored_from + tails - seq_len
    lengths = np.full(len(span), seq_len, dtype=np.int64)
    return Windows(
        np.concatenate((starts, window_starts)),
        np.concatenate((first, lengths)),
        np.concatenate((first, tails)),
    )


def read_batches(stream: TokenStream, batches: list[Windows]) -> Iterator[Batch]:
    """The tokens of each batch."""
    for windows in batches:
        longest, tail = int(windows.lengths.max()), int(windows.tails.max())
        ids = np.zeros((len(windows.starts), longest + 1), dtype=np.int64)
        for row, (start, length) in enumerate(zip(windows.starts, windows.lengths, strict=True)):
            ids[row, : length + 1] = stream.take(int(start), int(length) + 1)
        needed = np.arange(longest - tail, longest)
        lengths, tails = windows.lengths[:, None], windows.tails[:, None]
        rows, columns = np.nonzero((needed < lengths) & (needed >= lengths - tails))
        at = needed[columns]
        yield Batch(
            torch.from_numpy(ids[:, :-1]),
            None if tail == longest else tail,
            *(
                torch.from_numpy(found)
                for found in (
                    rows, columns, windows.starts[rows] + at, ids[rows, at], ids[rows, at + 1]
                )
            ),
        )  # fmt: skip
