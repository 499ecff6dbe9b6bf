"""Whatever is done to a file, it is refused in one line or opens as what its bytes say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.artifact import mix_coder
from tests import damage
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def goods() -> list[bytes]:
    """Undamaged files of every coder and grid, those of ``mix`` in several streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix_coder, "STREAM_CODES", damage.STREAM_CODES)
        yield damage.artifacts()


def test_undamaged_files_open(goods: list[bytes], tmp_path: Path) -> None:
    assert len(goods) == 40
    for good in goods:
        path = tmp_path / "good.qat"
        assert damage.verdict(path, "as it was", good, damage.read_as_it_says) == "opened"


def test_damage_is_refused_or_harmless(goods: list[bytes], tmp_path: Path) -> None:
    @settings(max_examples=600, deadline=None)
    @given(st.randoms(use_true_random=True), st.sampled_from(range(len(goods))))
    def one(chooser: random.Random, number: int) -> None:
        kind, data = damage.bad_artifact(chooser, goods[number])
        if data != goods[number]:
            damage.verdict(tmp_path / "bad.qat", kind, data, damage.read_as_it_says)

    one()


@pytest.mark.slow
@pytest.mark.parametrize(("which", "count"), [("qat", 24_000), ("ptz", 3_000)])
def test_thousands_within_bounds_of_time_and_memory(which: str, count: int) -> None:
    """In a process of its own: it could crash, and its memory is bounded as a whole."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.damage", which, str(count), "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    print(counts)
    assert counts["refused"] + counts["opened"] + counts.get("unchanged", 0) == count
    assert counts["refused"] > 0.8 * count
    assert counts["opened"] > 0.02 * count  # or the rest of the reader was never reached
