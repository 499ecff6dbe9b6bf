"""The folder of one run: ``<runs_dir>/<run_name>/`` or, in a sweep, ``<sweep>/<run_name>/``."""

from __future__ import annotations

import contextlib
import csv
import errno
import itertools
import json
import logging
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import filelock
import yaml

from qat.artifact.container import write_whole
from qat.errors import NO_LOCKS, UserError
from qat.runs import provenance

CONFIG, OVERRIDES, LOG, CHECKPOINT = "config.yaml", "overrides.yaml", "train.log", "checkpoint.ckpt"
CHOICES, EXPORTS, LOCK = "choices.json", "exports", ".lock"
METRICS, CURVE, KEPT, PROVENANCE = "metrics.csv", "curve.csv", "kept", "provenance.json"
DIRTY_DIFF = "dirty.diff"  # of a run of uncommitted code


def claim(
    parent: Path, typed_name: str | None, default_name: str, fill: Callable[[Path], None]
) -> Path:
    """Make the folder; a typed name already used is an error, a default one gets a number.

    ``fill`` says in it what the run is. It has its name when that is done: no full disk and no kill
    leave a folder that is in the way of the next try.
    """
    made = parent / f".{uuid.uuid4().hex}.tmp"
    try:
        made.mkdir(parents=True)
        fill(made)
        for number in itertools.count(1):
            suffix = "" if number == 1 else f"-{number}"
            folder = parent / (typed_name or default_name + suffix)
            if not folder.exists():
                try:
                    return made.rename(folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # a moment ago
                        raise
            if typed_name is not None:
                raise UserError(
                    f"run_name={typed_name}: {folder} is there already; give another name, "
                    f"or resume={folder} to go on with it"
                )
    except OSError as error:
        raise UserError(f"runs_dir={parent}: cannot write there ({error.strerror})") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    raise AssertionError("unreachable")


def run_folders(parent: Path) -> list[Path]:
    """The folders of runs in a folder, by name; not one that a process was killed in claiming."""
    return sorted(
        path
        for path in parent.iterdir()
        if (path / CONFIG).is_file() and not path.name.startswith(".")
    )


def check_writable(folder: Path, typed: str) -> None:
    """Make the folder that the setting ``typed`` names; UserError if no file can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{typed}: cannot write there ({error.strerror or error})") from None


def write_atomically(path: Path, text: str) -> None:
    """So that a reader never sees half a file. UserError if it cannot be written."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def lock(folder: Path, named: str | None = None) -> filelock.FileLock:
    """Hold the folder while this process lives, whatever name it takes. UserError if another
    process does; ``named``: what it calls the folder."""
    named = named or str(folder)
    held = filelock.FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{named}: another process is at work on this run") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            raise UserError(f"{named}: cannot lock {LOCK} there ({error})") from None
        raise UserError(f"{named}: cannot write there ({error.strerror or error})") from None
    for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    return held


def read_config(folder: Path, typed: str = "resume") -> tuple[str, dict[str, str | None]]:
    """(config.yaml, group -> option) of the run that the setting ``typed`` names. UserError if the
    folder is not a run's."""
    try:
        choices = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
        if not isinstance(choices, dict) or "qat" not in choices:
            raise ValueError(f"{CHOICES} names no choices")
        return (folder / CONFIG).read_text(encoding="utf-8"), choices
    except (OSError, ValueError) as error:
        raise UserError(
            f"{typed}={folder}: not the folder of a run, or damaged ({error}); put its "
            f"{CONFIG} and {CHOICES} back, or start it anew"
        ) from None


def read_overrides(folder: Path) -> list[str]:
    """What the run was asked for with. UserError if the folder is not a run's."""
    try:
        overrides = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8")) or []
        if not isinstance(overrides, list):
            raise ValueError(f"{OVERRIDES} is no list")
        return overrides
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"run={folder}: not the folder of a run ({reason})") from None


def kept_checkpoint(folder: Path, step: int) -> Path:
    """Where a run keeps its state after ``step`` updates."""
    return folder / KEPT / f"{step}.ckpt"


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / KEPT).glob("*.ckpt") if path.stem.isdigit())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``, one per update, but for one that a kill or a full disk
    cut off."""
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def describe(
    folder: Path,
    config_yaml: str,
    overrides: list[str],
    choices: Mapping[str, str | None],
    world_size: int,
) -> None:
    """Write everything needed to know what this run is, before it starts."""
    about = {
        CHOICES: json.dumps(dict(choices)),
        CONFIG: config_yaml,
        OVERRIDES: yaml.safe_dump(overrides),
        PROVENANCE: json.dumps(provenance.collect(world_size), indent=1),
    }
    if diff := provenance.dirty_diff():
        about[DIRTY_DIFF] = diff
    for name, text in about.items():
        (folder / name).write_text(text, encoding="utf-8")


def note_resumption(folder: Path, world_size: int) -> tuple[str, str]:
    """Note who goes on with the run; commits and machines of all so far, as a row names them."""
    path, now = folder / PROVENANCE, provenance.collect(world_size)
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        makers = [first, *first.get("resumed", []), now]
        commits, machines = ([maker[key] for maker in makers] for key in ("commit", "hardware"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return now["commit"], now["hardware"]  # a file for people is no reason to stop
    write_atomically(path, json.dumps(first | {"resumed": makers[1:]}, indent=1))
    return provenance.in_turn(commits), provenance.in_turn(machines)


class _LogFile(logging.FileHandler):
    """A disk that is full is said once, and ends nothing: what is logged is on the screen too."""

    is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_broken:
            self.is_broken = True
            print(f"warning: cannot write {self.baseFilename}: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written before
            super().close()


def open_log(folder: Path) -> logging.Handler:
    """Send the project's log to the run's ``train.log`` too; the caller removes the handler.
    UserError if the file cannot be opened."""
    try:
        handler = _LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {folder / LOG}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("qat").addHandler(handler)
    return handler
