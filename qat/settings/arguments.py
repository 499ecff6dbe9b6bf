"""The words typed after a program's name, made ready for Hydra and checked where it is silent."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib import import_module
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any, NoReturn, get_origin

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from qat.errors import UserError
from qat.settings import machine
from qat.settings.arms import ARM
from qat.settings.checks import locate_weights
from qat.settings.options import CONF, no_such_option
from qat.settings.schema import EvalTaskSettings, TrainSettings
from qat.settings.typed import SEARCHPATH, kinds

# They would move a run, or the folder that its paths begin in.
HYDRAS_FOLDERS = (
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir",
    "hydra.output_subdir",
)  # fmt: skip
OF_A_STUDY = ("clock", "prices")  # settings of it that are typed
SOURCE = "qat.training.initial_weights"  # by name: it is no part of train_gpt.py
OWN_OPTIONS = {"train": "experiment", "eval": "eval"}  # the group that sets all others, or most
SCHEMAS = {"train": TrainSettings, "eval": EvalTaskSettings}


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def split_flags(arguments: list[str], config_name: str) -> tuple[list[str], list[str], Namespace]:
    """(settings, flags as typed, flags as Hydra reads them). UserError for those refused here.

    Settings come first: argparse refuses them on both sides of a flag.
    """
    words = sorted(arguments, key=lambda word: "=" not in word or word.startswith("-"))
    words = [re.sub("^(-[^=]*=)(~.*)", lambda m: m[1] + expanduser(m[2]), w) for w in words]
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args, rest = parser.parse_known_args(words)
    settings = [*args.overrides, *(word for word in rest if not word.startswith("-"))]
    if wrong := [word for word in rest if word.startswith("-")]:
        raise UserError(f"{wrong[0]}: no such flag; see `python {config_name}.py --hydra-help`")
    if args.config_path or args.config_name not in (None, config_name):
        raise UserError(
            f"--config-{'path' if args.config_path else 'name'}: {config_name}.py is made of "
            f"conf/{config_name}.yaml; add options to it by --config-dir=DIR, in "
            f"DIR/{OWN_OPTIONS[config_name]}/"
        )
    if args.experimental_rerun:
        is_train = config_name == "train"
        again = "a run goes on, or is repeated, by resume=RUN" if is_train else "type it once more"
        raise UserError(f"--experimental-rerun: {again}")
    commands = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(both := [f"--{name.replace('_', '-')}" for name in commands if getattr(args, name)]) > 1:
        raise UserError(f"{' '.join(both)}: give one of them")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve: goes with --cfg")
    for setting in settings:
        words.remove(setting)
    return settings, words, args


def users_folders(config_dir: str | None, settings: list[str]) -> list[Path]:
    """Folders of ``--config-dir`` and ``hydra.searchpath``; of the latter Hydra takes ``pkg://``
    too, whose options are no ``qat`` options. UserError for one that is not there, and for an
    option that ``conf/`` hides."""
    asked = [("--config-dir", config_dir)] if config_dir is not None else []
    typed = [line for line in settings if line.startswith(f"{SEARCHPATH}=")]
    for override in OverridesParser.create().parse_overrides(typed):
        value = override.value()
        if not isinstance(value, list):
            raise UserError(f"{override.input_line}: give a list, {SEARCHPATH}=[DIR]")
        asked += [(SEARCHPATH, str(path)) for path in value if not str(path).startswith("pkg:")]
    for name, path in asked:
        if not isdir(folder := path.removeprefix("file://")):
            raise UserError(f"{name}={path}: no such folder")
        for ours in CONF.rglob("*.yaml"):  # found first, as Hydra looks for them
            theirs = Path(folder) / ours.relative_to(CONF)
            if theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
                raise UserError(f"{theirs}: {ours} has this name and would be taken; rename it")
    return [Path(path.removeprefix("file://")).resolve() for _, path in asked]


def with_profile(arguments: list[str], say: bool = True) -> list[str]:
    """Put the detected profile where ``auto`` was typed, or last if no profile was typed."""
    typed = [word for word in arguments if word.startswith("profile=")]
    if typed and not any(re.search(r"\bauto\b", word) for word in typed):
        return arguments
    profile, reason = machine.detect_profile()
    if say and machine.rank() == 0:
        print(f"profile={profile}: {reason}", file=sys.stderr)
    words = arguments if typed else [*arguments, "profile=auto"]
    return [re.sub(r"\bauto\b", profile, w) if w.startswith("profile=") else w for w in words]


def with_source(arguments: list[str], as_spelled: list[str]) -> list[str]:
    """Add what ``model.init_from`` says of itself: the sizes of its model, but for those typed (all
    are by ``model=OPTION``), and of a run its data, if no other was typed. UserError if it
    describes a model that this program has not.

    ``as_spelled``: the same arguments for Hydra.
    """
    if not any("model.init_from" in word for word in as_spelled):
        return arguments
    asked = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(as_spelled)}
    value = asked["model.init_from"].value() if "model.init_from" in asked else None
    if not isinstance(value, str) or "resume" in asked:
        return arguments
    has_data = any(key.partition(".")[0] == "data" for key in asked)
    try:
        runs = asked["runs_dir"].value() if "runs_dir" in asked else TrainSettings.runs_dir
        path = locate_weights(expanduser(value), expanduser(str(runs)))
        reader = import_module(SOURCE)
        spec = None if "model" in asked else reader.spec_of_source(Path(path))
        data = {} if has_data else reader.data_of_source(Path(path))
    except ModuleNotFoundError:
        whole = "train_gpt.py begins from random weights; this takes the whole project"
        raise UserError(f"model.init_from={value}: {whole}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"model.init_from={value}: {error}") from None
    arguments = [*arguments, *(f"data.{name}={_spelled(v)}" for name, v in data.items())]
    if spec is None:
        return arguments
    sizes = asdict(spec)
    more = {} if "model.more" in asked else sizes.pop("more")
    if "model.mlp_mult" in asked:
        more.pop("mlp_dim", None)
    sizes |= {f"more.{name}": size for name, size in more.items()}
    added = {f"model.{name}": str(size).lower() for name, size in sizes.items()}
    return [*arguments, *(f"{key}={size}" for key, size in added.items() if key not in asked)]


def _spelled(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower()


def known_keys(schema: type) -> set[str]:
    """All dotted setting names of a schema; one that takes any names below it ends in a dot too."""
    found = kinds(schema)
    return {*found, *(f"{name}." for name, kind in found.items() if get_origin(kind) is dict)}


@cache
def groups(config_name: str) -> frozenset[str]:
    """The groups of a program: those that its defaults list names."""
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    keys = {str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    return frozenset(key for key in keys if not key.startswith("override "))


def opened(arguments: list[str], config_name: str) -> list[str]:
    """Settings that take any names get what is typed, also where Hydra asks for a '+'."""
    takes_any = tuple(key for key in known_keys(SCHEMAS[config_name]) if key.endswith("."))
    return [f"++{a}" if f"{a.partition('=')[0]}.".startswith(takes_any) else a for a in arguments]


def unknown(key: str, known: set[str], config_name: str) -> str:
    parent = key.rpartition(".")[0]
    if parent in known and not any(name.startswith(f"{parent}.") for name in known):
        return f"{parent} takes one value, it has no parts"
    others = sorted(n for n in known if n[-1] != "." and not key.startswith(f"{n}."))
    last = key.rpartition(".")[2]
    alike = [name for name in others if name.rpartition(".")[2] == last]  # in another group
    close = difflib.get_close_matches(key, alike or others, n=1, cutoff=0.0 if alike else 0.6)
    hint = f"did you mean {close[0]}?" if close else f"see `python {config_name}.py --cfg job`"
    is_there = any(name.endswith(f".{key}") for name in close)  # in a group
    for other in SCHEMAS.keys() - {config_name}:
        if not is_there and key in known_keys(SCHEMAS[other]) | groups(other):
            hint = f"see `python {config_name}.py --cfg job`; it is one of {other}.py"
    return f"unknown setting; {hint}"


def _parsed(arguments: list[str], known: set[str], config_name: str) -> Iterator[Override]:
    """As Hydra reads them. UserError for a name that is unknown and a value that Hydra's grammar
    does not know either: the name is what is wrong."""
    for argument in arguments:
        try:
            yield from OverridesParser.create().parse_overrides([argument])
        except OverrideParseException:
            key = argument.partition("=")[0].lstrip("+~")
            is_name = re.fullmatch(r"[\w.]+", key) and not key.startswith("hydra.")
            if is_name and key not in known and f"{key.split('.')[0]}." not in known:
                raise UserError(f"{argument}: {unknown(key, known, config_name)}") from None
            raise


def check_settings(arguments: list[str], config_name: str) -> None:
    """Hydra adds ``+foo=1`` silently, removes by ``~foo`` what the program needs, lets a group be a
    list or null, and of what it does not know it does not say what was meant."""
    known = known_keys(SCHEMAS[config_name]) | groups(config_name)
    for override in _parsed(arguments, known, config_name):
        key, typed = override.key_or_group, override.input_line
        if key == "hydra/sweeper":
            raise UserError(f"{typed}: sweeps are products of values here; drop it")
        first, second, *_ = [*key.split("."), ""]
        if config_name == "train" and first == "study" and second not in OF_A_STUDY:
            of_it = "of it give arm=, seed=, study.clock= and study.prices="
            raise UserError(f"{typed}: a study is as its file says; {of_it}")
        if key in HYDRAS_FOLDERS:
            raise UserError(f"{typed}: the folders of runs are runs_dir, sweep_name and run_name")
        if key.startswith(("hydra.", "hydra/")):
            continue
        value = override.value()
        parts = value if isinstance(value, dict) and key in known else ()
        for name in [f"{key}.{part}" for part in parts] or [key]:
            if name not in known and name[: name.rfind(".") + 1] not in known:
                at = typed if name == key else name
                raise UserError(f"{at}: {unknown(name, known, config_name)}")
        if override.is_delete():
            raise UserError(f"{typed}: settings cannot be removed; give another value")
        has_parts = key not in groups(config_name) and any(n.startswith(f"{key}.") for n in known)
        if has_parts and isinstance(value, str | int | float | list) and "$" not in str(value):
            raise UserError(f"{typed}: {key} has parts and no options here; give {key}.NAME=VALUE")
        for option in value.list if isinstance(value, ChoiceSweep) else [value]:
            is_none = option in (None, "") or isinstance(option, list | dict | int | float)
            if key in groups(config_name) - {ARM} and is_none:
                if isinstance(option, dict) and option:
                    raise UserError(f"{typed}: give {key}.{next(iter(option))}=VALUE instead")
                raise no_such_option(str(typed), key)
