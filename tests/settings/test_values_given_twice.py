"""A value given twice in a sweep is one run trained twice, and listed as two seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Done


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["seed=1,1"], "seed=1: given twice; give it once"),
        (["qat=none,int6,none"], "qat=none: given twice; give it once"),
        (["seed=1,2,01"], "seed=1: given twice; give it once"),
        (["optimizer.matrix_lr=0.01,1e-2"], "optimizer.matrix_lr=0.01: given twice"),
        (["experiment=pair", "arm=int6,int6"], "arm=int6: given twice; give it once"),
        (["experiment=pair", "seed=3,3"], "seed=3: given twice; give it once"),
    ],
)
def test_they_are_refused_by_name(
    asked: list[str], message: str, train: Callable[..., Done]
) -> None:
    done = train("-m", *asked)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: {message}")
    assert not Path("logs").exists()
