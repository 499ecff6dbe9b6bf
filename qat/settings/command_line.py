"""From argv to checked settings to an exit code, with Hydra doing the composing.

What Hydra does not do and users expect: ``profile=auto`` is replaced before composition; every
mistake ends in one line and exit code 2; unknown keys added with ``+`` are refused; all jobs of a
sweep are checked before the first one starts; only rank 0 speaks.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import UserError
from qat.settings import machine
from qat.settings.schema import EvalTaskSettings, TrainSettings

CONF = Path(__file__).resolve().parents[2] / "conf"
SCHEMAS = {"train": TrainSettings, "eval": EvalTaskSettings}
# Prose and paths, taken as typed: Hydra's grammar would trip over ',' or '(' in them.
VERBATIM_KEYS = ("prompt", "artifact", "run", "runs")
INTERRUPTED = 130  # as shells say it
SWEEP_FLAGS = ("-m", "--multirun")


@dataclass(frozen=True)
class Job:
    """One run: how it was asked for, beside its settings."""

    choices: Mapping[str, str | None]  # group -> option
    overrides: list[str]  # as typed
    sweep_dir: Path | None  # None outside a sweep


@dataclass(frozen=True)
class Program:
    """train.py or eval.py: ``resolve`` completes settings, ``run`` returns an exit code."""

    config_name: str
    resolve: Callable[[Any, Mapping[str, str | None]], Any]
    run: Callable[[Any, Job], int]
    after_sweep: Callable[[Path, int], int] | None = None


def main(program: Program) -> int:
    """Compose, check and run; returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of exiting with 1
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        return _main(program)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        say_error(str(error))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # ValueError: what Hydra says of a group set to null; errors of a run do not come here.
        say_error(explain(error, program.config_name))
    return UserError.exit_code


def say_error(line: str) -> None:
    if machine.rank() == 0:
        print(f"error: {line}", file=sys.stderr)


def _main(program: Program) -> int:
    arguments = [_quote(argument) for argument in sys.argv[1:]]
    if program.config_name == "train":
        arguments = _with_profile(arguments)
    _refuse_unknown_additions(arguments, program.config_name)
    is_sweep = any(flag in arguments for flag in SWEEP_FLAGS)
    arguments = _overrides_together(arguments)
    num_jobs = _check_sweep(program, arguments) if is_sweep else 1
    exit_codes: list[int] = []
    sweep_dirs: set[Path] = set()

    def run_job(config: DictConfig) -> None:
        run = HydraConfig.get()
        job = Job(
            {k: v for k, v in run.runtime.choices.items() if not k.startswith("hydra/")},
            list(run.overrides.task),
            Path(run.sweep.dir) if run.mode == RunMode.MULTIRUN else None,
        )
        try:
            settings = program.resolve(OmegaConf.to_object(config), job.choices)
            exit_codes.append(program.run(settings, job))
        except UserError as error:  # here, because Hydra would add lines of its own
            say_error(str(error))
            exit_codes.append(error.exit_code)
        if job.sweep_dir is not None:
            sweep_dirs.add(job.sweep_dir)

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=program.config_name)(
        run_job
    )()
    if is_sweep and program.after_sweep and sweep_dirs:
        return max(program.after_sweep(sweep_dirs.pop(), num_jobs), *exit_codes, 0)
    return max(exit_codes, default=0)


def _overrides_together(arguments: list[str]) -> list[str]:
    """Settings first, flags after them: argparse refuses settings on both sides of a flag."""
    return sorted(arguments, key=lambda a: not _is_setting(a))


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _quote(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if key in VERBATIM_KEYS and equals and value[:1] not in ("'", '"') and value != "null":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return argument


def _with_profile(arguments: list[str]) -> list[str]:
    """Put the detected profile where ``auto`` was typed, or first if no profile was typed."""
    profile, reason = machine.detect_profile()
    typed = [a for a in arguments if a.startswith("profile=")]
    if typed and not any("auto" in a.removeprefix("profile=").split(",") for a in typed):
        return arguments
    if machine.rank() == 0 and not any(a in ("-h", "--help", "--cfg", "-c") for a in arguments):
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
    """All dotted setting names of a schema."""
    keys: set[str] = set()
    for field in fields(schema):
        kind = get_type_hints(schema)[field.name]
        keys.add(prefix + field.name)
        if isinstance(kind, type) and is_dataclass(kind):
            keys |= known_keys(kind, f"{prefix}{field.name}.")
    return keys


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()}


def _unknown(key: str, config_name: str) -> str:
    known = sorted(known_keys(SCHEMAS[config_name]) | _groups())
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"see `python {config_name}.py --cfg job`"
    return f"unknown setting; {hint}"


def _refuse_unknown_additions(arguments: list[str], config_name: str) -> None:
    """Hydra adds ``+foo=1`` silently, and ``~foo`` removes settings the program needs."""
    for argument in arguments:
        if argument[:1] not in ("+", "~"):
            continue
        key = argument.lstrip("+~").partition("=")[0]
        if key.startswith("hydra"):
            continue
        if key not in known_keys(SCHEMAS[config_name]) | _groups():
            raise UserError(f"{argument}: {_unknown(key, config_name)}")
        if argument.startswith("~"):
            raise UserError(f"{argument}: settings cannot be removed; give another value")


def _check_sweep(program: Program, arguments: list[str]) -> int:
    """Compose and check every job of a sweep before the first starts; returns their number."""
    if machine.world_size() > 1:
        raise UserError(
            "-m: a sweep starts its own jobs; run it without torchrun, or one job per torchrun"
        )
    overrides = [a for a in arguments if _is_setting(a)]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):

        def compose(lines: list[str]) -> DictConfig:
            return hydra.compose(program.config_name, lines, return_hydra_config=True)

        parser = OverridesParser.create()
        parsed = parser.parse_overrides(overrides)
        plain = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        params = compose(plain).hydra.sweeper.get("params") or {}
        typed = {o.get_key_element() for o in parsed}
        if twice := typed & set(params):
            raise UserError(
                f"{min(twice)}: the experiment sweeps it already; drop it from the command"
            )
        lines = parser.parse_overrides([f"{key}={value}" for key, value in params.items()]) + parsed
        choices = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [str(o.input_line)]
            for o in lines
        ]
        jobs = list(itertools.product(*choices))
        names = []
        for job in jobs:
            config = compose(list(job))
            runtime_choices = dict(config.hydra.runtime.choices)
            del config.hydra
            settings = program.resolve(OmegaConf.to_object(config), runtime_choices)
            names.append(getattr(settings, "run_name", None))
    shared = {name for name in names if name is not None and names.count(name) > 1}
    if shared:
        raise UserError(f"run_name={min(shared)}: {len(jobs)} jobs would share it; leave it out")
    return len(jobs)


def explain(error: Exception, config_name: str) -> str:
    """One line for a mistake that Hydra or OmegaConf found, naming the setting as typed."""
    text = str(error)
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) else ""
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        return f"{match[1]}={match[2]}: no such option; choose from {', '.join(options) or 'none'}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: {_unknown(match[1].split('@')[0], config_name)}"
    if match := re.search(r"Error merging override (.+)", text):
        return f"{match[1]}: {detail or 'not a usable value'}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: several values; add -m to run each of them, or [..] for a list"
    if match := re.search(r"Error parsing override '(.+)'", text):
        return f"{match[1]}: cannot be read as setting=value; quote values with special characters"
    return " ".join(f"{text} {detail}".split())
