"""Validation text that is in the training text too, however both are cut into shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qat.errors import UserError
from qat.text import shards
from qat.text.shards import ShardWriter, TokenStream
from qat.text.source import Source, check_apart


def stream(folder: Path, ids: np.ndarray, shard_tokens: int = 10_000) -> TokenStream:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "s", shard_tokens)
    writer.write(ids)
    writer.close()
    return TokenStream(sorted(folder.glob("*.bin")), "data.train_files")


def test_a_passage_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([5, 5, 6, 5, 5, 5, 7, 8, 9])
    for number, chunk_tokens in enumerate((100, 9)):
        monkeypatch.setattr(shards, "CACHED_TOKENS", chunk_tokens)
        held = stream(tmp_path / str(number), ids)
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                assert held.holds(ids[start:end])
        for other in ([6, 5, 7], [9, 5], [*ids, 1], [10]):
            assert not held.holds(other)


def test_most_of_the_validation_text_in_the_training_text_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ours, other = rng.integers(0, 50, (2, 9_000))
    source = Source([], [], tmp_path / "t.model", {"name": "shards"}, {})
    val = stream(tmp_path / "val", ours)
    apart = stream(tmp_path / "other", other)
    check_apart(source, apart, val)
    for number, (text, shard_tokens) in enumerate(
        [(ours, 4_001), (np.concatenate([other, ours, other[:5]]), 30_000), (ours[3:], 9_000)]
    ):
        held = stream(tmp_path / f"train{number}", text, shard_tokens)
        with pytest.raises(UserError, match=r"^data\.val_files: [34] of 4 passages of it"):
            check_apart(source, held, val)
        check_apart(replace(source, identity={"name": "text"}), held, val)  # was split by document
    few = stream(tmp_path / "few", np.concatenate([other, ours[:4_000]]), 30_000)
    check_apart(source, few, val)  # some text repeats in any corpus
