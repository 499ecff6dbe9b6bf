"""On the GPU: ``pytest -m cuda tests/cuda``; what needs none is elsewhere, and sees none."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny(tiny: list[str]) -> list[str]:
    """Eager: compiling takes half a minute a run, and bits and devices are what is looked at."""
    return [*tiny, "compile=false"]
