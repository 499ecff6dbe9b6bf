"""Pareto dominance against its definition, written out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qat.cabinet.summary import dominated

KEYS = ("a", "b", "c")
few = st.integers(0, 4)  # so that there are ties
tables = st.lists(st.fixed_dictionaries(dict.fromkeys(KEYS, few)), max_size=12)


@given(tables, st.sampled_from([KEYS, KEYS[:2], KEYS[:1]]))
def test_as_the_definition_says(rows: list[dict[str, int]], keys: tuple[str, ...]) -> None:
    expected = []
    for row in rows:
        is_beaten = False
        for other in rows:
            never_higher = sum(other[key] > row[key] for key in keys) == 0
            once_lower = sum(other[key] < row[key] for key in keys) > 0
            is_beaten |= never_higher and once_lower
        expected.append(is_beaten)
    assert dominated(rows, keys) == expected


@given(tables)
def test_somebody_is_left_and_what_is_out_is_beaten_by_the_frontier(rows: list[dict]) -> None:
    beaten = dominated(rows, KEYS)
    frontier = [row for row, out in zip(rows, beaten, strict=True) if not out]
    assert bool(frontier) == bool(rows)
    assert not any(dominated(frontier, KEYS))
    for row, out in zip(rows, beaten, strict=True):
        assert out == any(dominated([*frontier, row], KEYS)[-1:])


def test_equals_do_not_beat_each_other() -> None:
    row = {"a": 1.0, "b": 2.0}
    assert dominated([row, dict(row), {"a": 1.0, "b": 2.5}], ("a", "b")) == [False, False, True]
