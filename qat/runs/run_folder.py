"""The folder of one run: ``<runs_dir>/<run_name>/`` or, in a sweep, ``<sweep>/<run_name>/``."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import filelock
import yaml

from qat.artifact.container import write_whole
from qat.errors import UserError
from qat.runs import provenance

CONFIG, OVERRIDES, LOG, CHECKPOINT = "config.yaml", "overrides.yaml", "train.log", "checkpoint.ckpt"
CHOICES, EXPORTS, LOCK = "choices.json", "exports", ".lock"
METRICS = "metrics.csv"


def claim(parent: Path, typed_name: str | None, default_name: str) -> Path:
    """Make the folder; a typed name already used is an error, a default one gets a number."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runs_dir={parent}: cannot write there ({error.strerror})") from None
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"-{number}"
        folder = parent / (typed_name or default_name + suffix)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if typed_name is not None:
                raise UserError(
                    f"run_name={typed_name}: {folder} is there already; give another name"
                ) from None
        except OSError as error:
            raise UserError(f"runs_dir={parent}: cannot write there ({error.strerror})") from None
    raise AssertionError("unreachable")


def write_atomically(path: Path, text: str) -> None:
    """So that a reader never sees half a file. UserError if it cannot be written."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def lock(folder: Path) -> filelock.FileLock:
    """Hold the folder while this process lives. UserError if another process does."""
    held = filelock.FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is at work on this run") from None
    except (OSError, NotImplementedError) as error:  # a network file system that knows no flock
        raise UserError(f"{folder}: cannot lock {LOCK} there ({error})") from None
    for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    return held


def read_config(folder: Path, typed: str = "resume") -> tuple[str, dict[str, str | None]]:
    """(config.yaml, group -> option) of the run that the setting ``typed`` names. UserError if the
    folder is not a run's."""
    try:
        choices = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
        return (folder / CONFIG).read_text(encoding="utf-8"), choices
    except (OSError, ValueError) as error:
        raise UserError(f"{typed}={folder}: not the folder of a run ({error})") from None


def read_overrides(folder: Path) -> list[str]:
    """What the run was asked for with. UserError if the folder is not a run's."""
    try:
        overrides = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8")) or []
        if not isinstance(overrides, list):
            raise ValueError(f"{OVERRIDES} is no list")
        return overrides
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run={folder}: not the folder of a run ({error})") from None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``, one per update."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
        "provenance.json": json.dumps(provenance.collect(world_size), indent=1),
    }
    if diff := provenance.dirty_diff():
        about["dirty.diff"] = diff
    for name, text in about.items():
        write_atomically(folder / name, text)


def open_log(folder: Path) -> logging.Handler:
    """Send the project's log to the run's ``train.log`` too; the caller removes the handler."""
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("qat").addHandler(handler)
    return handler
