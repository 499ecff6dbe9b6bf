"""The words typed after a program's name, made ready for Hydra and checked where it is silent."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from omegaconf import DictConfig, OmegaConf

from qat.errors import UserError
from qat.settings import machine
from qat.settings.arms import ARM
from qat.settings.options import CONF
from qat.settings.schema import EvalTaskSettings, TrainSettings

SCHEMAS = {"train": TrainSettings, "eval": EvalTaskSettings}
# Prose and paths of eval.py, taken as typed: Hydra's grammar would trip over ',' or '(' in them.
VERBATIM_KEYS = (
    "prompt", "artifact", "out", "run", "runs", "study", "cabinet", "submission.author",
    "submission.github_id", "submission.name", "submission.blurb",
)  # fmt: skip
QUIET_FLAGS = ("-h", "--help", "--version", "-c", "--cfg", "-i", "--info")


def overrides_together(arguments: list[str]) -> list[str]:
    """Settings first, flags after them: argparse refuses settings on both sides of a flag."""
    return sorted(arguments, key=lambda a: not is_setting(a))


def is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def take_verbatim(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(arguments for Hydra, settings that are prose or paths: whatever follows the '=')."""
    parts = [argument.partition("=") for argument in arguments]
    verbatim = {key: value for key, equals, value in parts if equals and key in VERBATIM_KEYS}
    return ["".join(part) for part in parts if not (part[1] and part[0] in verbatim)], verbatim


def put_verbatim(settings: Any, verbatim: Mapping[str, str]) -> None:
    """Set what ``take_verbatim`` took, by dotted name."""
    for key, value in verbatim.items():
        *groups_of_it, name = key.split(".")
        setattr(reduce(getattr, groups_of_it, settings), name, value)


def with_profile(arguments: list[str]) -> list[str]:
    """Put the detected profile where ``auto`` was typed, or first if no profile was typed."""
    if "--hydra-help" in arguments or any(a.startswith("resume=") for a in arguments):
        return arguments  # composed from Hydra's own settings, or from the run's
    profile, reason = machine.detect_profile()
    typed = [a for a in arguments if a.startswith("profile=")]
    if typed and not any("auto" in a.removeprefix("profile=").split(",") for a in typed):
        return arguments
    if machine.rank() == 0 and not any(a.split("=")[0] in QUIET_FLAGS for a in arguments):
        print(f"profile={profile}: {reason}", file=sys.stderr)
    if not typed:
        return [*arguments, f"profile={profile}"]

    def concrete(argument: str) -> str:
        if not argument.startswith("profile="):
            return argument
        options = argument.removeprefix("profile=").split(",")
        return "profile=" + ",".join(profile if o == "auto" else o for o in options)

    return [concrete(a) for a in arguments]


def known_keys(schema: type, prefix: str = "") -> set[str]:
    """All dotted setting names of a schema; one that takes any names below it ends in a dot too."""
    keys: set[str] = set()
    for field in fields(schema):
        kind = get_type_hints(schema)[field.name]
        keys.add(prefix + field.name)
        if get_origin(kind) is dict:
            keys.add(f"{prefix}{field.name}.")
        if isinstance(kind, type) and is_dataclass(kind):
            keys |= known_keys(kind, f"{prefix}{field.name}.")
    return keys


def groups(config_name: str) -> set[str]:
    """The groups of a program: those that its defaults list names."""
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    keys = {str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    return {key for key in keys if not key.startswith("override ")}


def check_options(arguments: list[str], config_name: str) -> None:
    """A group takes the name of one option, never a list or null."""
    names = groups(config_name) - {ARM}
    settings = [a for a in arguments if is_setting(a) and a.split("=")[0] in names]
    for override in OverridesParser.create().parse_overrides(settings):
        options = [path.stem for path in sorted((CONF / override.key_or_group).glob("*.yaml"))]
        value = override.value()
        for option in value.list if isinstance(value, ChoiceSweep) else [value]:
            if isinstance(option, list) or str(option) not in options:
                typed = override.input_line
                raise UserError(f"{typed}: no such option; choose from {', '.join(options)}")


def unknown(key: str, config_name: str) -> str:
    known = sorted(
        k for k in known_keys(SCHEMAS[config_name]) | groups(config_name) if k[-1] != "."
    )
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"see `python {config_name}.py --cfg job`"
    return f"unknown setting; {hint}"


def refuse_unknown_additions(arguments: list[str], config_name: str) -> None:
    """Hydra adds ``+foo=1`` silently, and ``~foo`` removes settings the program needs."""
    for argument in arguments:
        if argument[:1] not in ("+", "~"):
            continue
        key = argument.lstrip("+~").partition("=")[0]
        if key.startswith("hydra"):
            continue
        known = known_keys(SCHEMAS[config_name]) | groups(config_name)
        if key not in known and key[: key.rfind(".") + 1] not in known:
            raise UserError(f"{argument}: {unknown(key, config_name)}")
        if argument.startswith("~"):
            raise UserError(f"{argument}: settings cannot be removed; give another value")
