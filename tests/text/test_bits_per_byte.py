"""Promise 6: the bytes of any text are the sum over its tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qat.text.byte_table import SPACE, bits_per_byte
from qat.text.source import from_web_bible
from qat.text.tokenizer import Tokenizer
from tests.conftest import GOLF


@pytest.fixture(scope="module")
def tokenizer(cache_dir: Path) -> Tokenizer:
    return Tokenizer(from_web_bible(1024, 0.05, cache_dir).tokenizer)


def counted(tokenizer: Tokenizer, text: str) -> int:
    return tokenizer.count_bytes(tokenizer.encode_document(text))


ordinary = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
spaced = st.text(f"ab \t\n\r.,'{SPACE}\u00e9\u4e2d\U0001f600\u0301\x00", max_size=60)


@given(ordinary | spaced)
@example("")
@example(" ")
@example(f"{SPACE}a {SPACE} b{SPACE}")
@example("   leading and trailing   ")
@example("tabs\t\tand\r\nlines\n\n")
@example("\U0001f469\u200d\U0001f4bb \u4e2d\u6587 e\u0301 \x00")
def test_bytes_of_a_text_are_the_sum_over_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert counted(tokenizer, text) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


def test_a_space_after_a_boundary_is_not_counted_twice(tokenizer: Tokenizer) -> None:
    """Two documents in a stream: BOS between them has no bytes and swallows the dummy space."""
    ids = tokenizer.encode_document("one") + tokenizer.encode_document("two words")
    assert tokenizer.count_bytes(ids) == len("one") + len("two words")


def test_the_challenge_tokenizer_counts_by_the_same_rule() -> None:
    tokenizer = Tokenizer(GOLF / "tokenizer.model")
    text = "In the beginning God created the heaven and the earth."
    assert counted(tokenizer, text) == len(text)


def test_bits_per_byte_of_a_uniform_guess() -> None:
    """Guessing 256 equally likely bytes costs 8 bits each."""
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0, abs=1e-12)
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte(1.0, 0)
