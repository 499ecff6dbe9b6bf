"""The pairs of the house, pairs from files, and what is said about them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from qat.analysis.generated_pairs import SUBJECTS, VERBS, generated_pairs
from qat.analysis.intervals import wilson_interval
from qat.analysis.minimal_pairs import (
    Accuracy,
    Comparison,
    Pair,
    accuracy,
    accuracy_by_kind,
    are_right,
    compare,
    read_pairs,
)
from qat.errors import UserError

PAIRS = generated_pairs()


def test_many_pairs_none_twice_always_the_same() -> None:
    assert len(PAIRS) >= 1_500
    assert len({(pair.good, pair.bad) for pair in PAIRS}) == len(PAIRS)
    assert not {pair.good for pair in PAIRS} & {pair.bad for pair in PAIRS}
    assert generated_pairs() == PAIRS
    assert {pair.kind for pair in PAIRS} == {
        "agreement", "attractor", "bare_verb", "be", "do", "have", "participle", "past_tense",
    }  # fmt: skip


def test_a_pair_differs_in_one_word() -> None:
    for pair in PAIRS:
        good, bad = pair.good.split(" "), pair.bad.split(" ")
        assert len(good) == len(bad)
        assert sum(a != b for a, b in zip(good, bad, strict=True)) == 1, pair
        for sentence in (pair.good, pair.bad):
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert "_" not in sentence
            assert "  " not in sentence


@pytest.mark.parametrize(
    "pair",
    [
        Pair("He walks to the store every day.", "He walk to the store every day.", "agreement"),
        Pair("They go to the city every day.", "They goes to the city every day.", "agreement"),
        Pair("Yesterday he walked to the store.", "Yesterday he walks to the store.", "past_tense"),
        Pair("Yesterday they went to the city.", "Yesterday they go to the city.", "past_tense"),
        Pair("The king has eaten bread.", "The king has eat bread.", "participle"),
        Pair("The women did not eat bread.", "The women did not ate bread.", "bare_verb"),
        Pair("The child does not eat bread.", "The child do not eat bread.", "do"),
        Pair("The servants were in the house.", "The servants was in the house.", "be"),
        Pair("The king is old.", "The king are old.", "be"),
        Pair("The kings have two sons.", "The kings has two sons.", "have"),
        Pair("The keys to the box are old.", "The keys to the box is old.", "attractor"),
        Pair("The key to the boxes was here.", "The key to the boxes were here.", "attractor"),
    ],
)
def test_pairs_picked_by_hand_are_there(pair: Pair) -> None:
    assert pair in PAIRS


def test_no_form_of_a_verb_is_another_one() -> None:
    """Where past or participle is the base form, the bad sentence would be a good one."""
    for base, third, past, participle, _ in VERBS:
        assert len({base, third, past}) == 3
        assert participle not in (base, third)
    starts = {subject.split()[0] for subject, _ in SUBJECTS}
    assert not starts & {"i", "you"}


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = (
        '{"good": "Wir sind müde.", "bad": "Wir ist müde.", "kind": "sein"}',
        "",
        '{"bad": "He go.", "good": "He goes.", "source": "me"}',
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_pairs(path) == [
        Pair("Wir sind müde.", "Wir ist müde.", "sein"),
        Pair("He goes.", "He go.", "pairs"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"bad": "b"}', '"good" is missing'),
        (b'{"good": "a", "kind": "k"}', '"bad" is missing'),
        (b'{"good": "a", "bad": 3}', '"bad" is not a string'),
        (b'{"good": null, "bad": "b"}', '"good" is not a string'),
        (b'{"good": "a", "bad": "b", "kind": 1}', '"kind" is not a string'),
        (b'{"good": "a", "bad": ""}', '"bad" is empty'),
        (b'{"good": " ", "bad": "b"}', '"good" is empty'),
        (b'{"good": "a", "bad": "b", "kind": ""}', '"kind" is empty'),
        (b'{"good": "a", "bad": "a"}', '"good" and "bad" are the same'),
        (b"a,b", "not JSON"),
        (b'{"good": "a", "bad": "b"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["a", "b"]', 'not an object with "good" and "bad"'),
        (b'{"good": "\xff", "bad": "b"}', "not UTF-8 text (byte 10)"),
        (b'{"good": "a\\ud800", "bad": "b"}', '"good" has half of a surrogate pair'),
    ],
)
def test_a_line_that_is_no_pair_is_named(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"good": "a", "bad": "b"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    assert str(caught.value) == f"eval.pairs_file={path}, line 3: {reason}"


def test_a_file_without_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match=r"eval\.pairs_file=.*pairs\.jsonl: No such file"):
        read_pairs(path)
    with pytest.raises(UserError, match=r"eval\.pairs_file=.*: Is a directory"):
        read_pairs(tmp_path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"eval\.pairs_file=.*: no pairs; give lines \{\"good\""):
        read_pairs(path)


def test_ties_and_nan_are_wrong() -> None:
    good, bad = np.array([1.0, 2.0, 3.0, math.nan]), np.array([2.0, 2.0, 1.0, 5.0])
    assert are_right(good, bad).tolist() == [True, False, False, False]


def test_accuracy_by_kind_and_against_another_model() -> None:
    pairs = [Pair("a", "b", kind) for kind in ("x", "y", "x", "x")]
    is_right = np.array([True, True, False, True])
    assert accuracy(is_right) == Accuracy(3, 4, *wilson_interval(3, 4))
    by_kind = accuracy_by_kind(pairs, is_right)
    assert list(by_kind) == ["x", "y"]
    assert by_kind["x"] == Accuracy(2, 3, *wilson_interval(2, 3))
    assert by_kind["y"] == Accuracy(1, 1, *wilson_interval(1, 1))
    other = np.array([False, True, True, False])
    assert compare(is_right, other) == Comparison(2, 1, 1.0)
    assert compare(is_right, is_right) == Comparison(0, 0, 1.0)
