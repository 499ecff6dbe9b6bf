"""What to type to get a finished run's settings again, anywhere and outside its sweep."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from qat.errors import UserError
from qat.settings.arms import ARM
from qat.settings.options import options
from qat.settings.schema import EvalTaskSettings, TrainSettings
from qat.settings.typed import in_quotes

# Names and places of that run, how it was watched, and which run made its first updates: in one
# piece it has the same bits.
LEFT_OUT = ("run_name", "runs_dir", "sweep_name", "resume", "logger", "fork")
TEXT_PATHS = ("data.train_files", "data.val_files", "data.tokenizer", "data.files")
SCORE_PATHS = ("data.val_files", "data.tokenizer", "data.files")


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _spelled(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_spelled(item) for item in value) + "]"
    if isinstance(value, str):
        return in_quotes(value)
    return "null" if value is None else str(value).lower()


def _value(settings: object, key: str) -> Any:
    return reduce(getattr, key.split("."), settings)


def replayed(
    overrides: list[str], settings: TrainSettings, choices: Mapping[str, str | None]
) -> list[str]:
    """Overrides of train.py that compose ``settings`` again.

    ``overrides`` are those the run was asked for with (in a sweep, its job's own), ``settings``
    those saved with it, whose paths are absolute, ``choices`` its options, group -> option. Paths
    and environment variables are taken from the settings; the profile is always named, since
    without one the machine decides. UserError for an option of a user's own folder.
    """
    kept = [f"profile={choices['profile']}"]
    named = [path for path in TEXT_PATHS if _value(settings, path) is not None]
    for override in overrides:
        key = _key(override)
        if key.split(".")[0] in (*LEFT_OUT, "profile") or key in named:
            continue
        if "$" not in override:  # of ${oc.env:NAME}, which sweeps spell with backslashes
            kept.append(override)
        elif key in choices:
            kept.append(f"{key}={choices[key]}")
        else:
            kept.append(f"{key}={_spelled(_value(settings, key))}")
        if key in choices and choices[key] not in (None, *options(key)) and key != ARM:
            raise UserError(f"{key}={choices[key]}: not in conf/{key}/; copy it there, too")
    kept += [f"{path}={_spelled(_value(settings, path))}" for path in named]
    return kept


def score_arguments(settings: TrainSettings) -> list[str]:
    """What eval.py needs beside ``artifact=`` to score it as the run did."""
    defaults = EvalTaskSettings()
    asked = (*SCORE_PATHS, "data.cache_dir", "eval.precision", "eval.batch_tokens")
    return [
        f"{key}={_spelled(_value(settings, key))}"
        for key in asked
        if _value(settings, key) != _value(defaults, key)
    ]
