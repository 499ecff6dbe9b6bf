"""Tiers against a loop, and counts against all tokens at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.analysis import damage as frequency_tiers
from qat.analysis.damage import TIERS, count_tokens, tier_by_token
from qat.errors import UserError
from qat.text.shards import ShardWriter, TokenStream
from tests.conftest import GOLF


def by_hand(counts: list[int]) -> list[str]:
    names, seen = [""] * len(counts), 0
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        share = Fraction(seen, max(1, sum(counts)))
        if not counts[token] or share >= Fraction(9, 10):
            names[token] = "tail"
        else:
            names[token] = "head" if share < Fraction(1, 2) else "mid"
        seen += counts[token]
    return names


@given(st.lists(st.integers(0, 12) | st.integers(0, 10**15), max_size=40))
def test_tiers_are_those_of_a_loop(counts: list[int]) -> None:
    tiers = tier_by_token(np.array(counts, dtype=np.int64))
    assert [TIERS[tier] for tier in tiers] == by_hand(counts)


def test_shares_and_ties() -> None:
    tiers = tier_by_token(np.array([10, 0, 30, 30, 20, 10]))
    assert [TIERS[tier] for tier in tiers] == ["mid", "tail", "head", "head", "mid", "tail"]
    assert tier_by_token(np.zeros(3, dtype=np.int64)).tolist() == [2, 2, 2]


def stream_of(folder: Path, tokens: list[int]) -> TokenStream:
    writer = ShardWriter(folder, "train", 100)
    writer.write(tokens)
    writer.close()
    return TokenStream(list(folder.glob("train_*.bin")), "data.train_files")


def test_all_tokens_are_counted_once() -> None:
    stream = TokenStream([GOLF / "fineweb_val_000000.bin"], "data.val_files")
    expected = np.bincount(stream.take(0, len(stream)), minlength=1024)
    assert np.array_equal(count_tokens(stream, 1024, 10**12), expected)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_chunks_are_spread_and_never_overlap(
    chunk_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequency_tiers, "CHUNK_TOKENS", chunk_tokens)
    stream = stream_of(tmp_path, list(range(450)))
    for max_tokens in (0, 1, 2, 20, 99, 300, 448, 449, 450, 451, 10_000):
        counts = count_tokens(stream, 450, max_tokens)
        assert counts.sum() == min(450, max_tokens)
        assert counts.max() <= 1
        if (chunk_tokens, max_tokens) == (7, 99):  # 15 chunks
            assert all(third.sum() == 33 for third in np.split(counts, 3))


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [1, 2, 70])
    with pytest.raises(UserError, match=r"data\.train_files: it holds token id 70.*ends at 69"):
        count_tokens(stream, 70, 100)
    assert count_tokens(stream, 71, 100)[70] == 1
