"""A run's folder on file systems that lack something."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import filelock
import pytest

from qat.errors import UserError
from qat.runs import run_folder
from qat.text import source


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("no flock")]
)
def test_a_file_system_without_flock(error: Exception, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match=re.escape(f"cannot lock .lock there ({error})")):
        run_folder.lock(tmp_path)
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"cannot lock .lock there ({error})")):
        run_folder.claim(tmp_path, "r", "default", run_folder.lock)
    assert not (tmp_path / "r").exists(), "the next try would find its name taken"
    with pytest.raises(UserError, match=f"data.cache_dir={tmp_path}: cannot lock files there"):
        source.from_text([str(tmp_path / "a.txt")], 300, 0.1, tmp_path)


def test_a_folder_that_is_locked_stays_so_as_it_takes_its_name(tmp_path: Path) -> None:
    held = []
    folder = run_folder.claim(
        tmp_path, "r", "default", lambda made: held.append(run_folder.lock(made))
    )
    with pytest.raises(UserError, match="r: another process is at work on this run"):
        run_folder.lock(folder)
    held[0].release()
    run_folder.lock(folder).release()
