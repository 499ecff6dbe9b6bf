"""W&B kept to itself: nothing in the user's home, no login, no way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _wandb_in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        yield


@pytest.fixture
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "NETRC"):  # where a developer's own login may be
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
