"""From argv to checked settings to an exit code, with Hydra doing the composing.

What Hydra does not do and users expect: ``profile=auto`` is replaced before composition; every
mistake ends in one line and exit code 2; unknown keys added with ``+`` are refused; all jobs of a
sweep are checked before the first one starts; only rank 0 speaks.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat.errors import TrainingError, UserError
from qat.settings import machine
from qat.settings.arguments import (
    SCHEMAS,
    check_options,
    groups,
    is_setting,
    overrides_together,
    put_verbatim,
    refuse_unknown_additions,
    take_verbatim,
    unknown,
    with_profile,
)
from qat.settings.arms import ARM, with_arms
from qat.settings.options import CONF
from qat.settings.schema import as_settings

INTERRUPTED = 130  # as shells say it
SWEEP_FLAGS = ("-m", "--multirun")
SECONDS_TO_SPEAK = 10.0  # rank 0 may be slower; it is hardly ever more than one
# It listens on loopback alone, and sends its makers no report of its use.
RAY_KEEPS_TO_ITSELF = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Job:
    """One run: how it was asked for, beside its settings."""

    choices: Mapping[str, str | None]  # group -> option
    overrides: list[str]  # as typed
    sweep_dir: Path | None  # None outside a sweep


@dataclass(frozen=True)
class Sweep:
    """Several runs, checked: where they go, and the study that they are, if one."""

    folder: Path
    study: str | None
    jobs: list[tuple[Any, Mapping[str, str | None]]]  # settings and choices of each
    command: str  # as typed


@dataclass(frozen=True)
class Program:
    """train.py or eval.py: ``resolve`` completes settings, ``run`` returns an exit code."""

    config_name: str
    resolve: Callable[[Any, Mapping[str, str | None]], Any]
    run: Callable[[Any, Job], int]
    before_sweep: Callable[[Sweep], None] | None = None
    after_sweep: Callable[[Sweep], int] | None = None


def main(program: Program) -> int:
    """Compose, check and run; returns the exit code. What goes wrong in a run stays in ``run``."""
    machine.keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of exiting with 1
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        exit_code = _main(program)
        if exit_code:
            _let_rank_0_speak()
        return exit_code
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except UserError as error:
        say_error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        say_error(explain(error, program.config_name))
    except OSError as error:  # Hydra makes the sweep's folder
        say_error(f"runs_dir: cannot write {error.filename} ({error.strerror})")
    _let_rank_0_speak()
    return UserError.exit_code


def _let_rank_0_speak() -> None:
    """torchrun ends all ranks when the first one fails, and a mistake fails all of them at once."""
    if machine.rank() != 0:
        time.sleep(SECONDS_TO_SPEAK)


def say_error(line: str) -> None:
    if machine.rank() == 0:
        print(f"error: {line}", file=sys.stderr)


def _main(program: Program) -> int:
    arguments = sys.argv[1:]
    verbatim: dict[str, str] = {}
    if program.config_name == "train":
        arguments = with_profile(arguments)
    else:
        arguments, verbatim = take_verbatim(arguments)
    is_sweep = any(flag in arguments for flag in SWEEP_FLAGS)
    if is_sweep and program.after_sweep is None:
        raise UserError(f"-m: {program.config_name}.py does one thing at a time; drop -m")
    refuse_unknown_additions(arguments, program.config_name)
    check_options(arguments, program.config_name)
    if program.config_name == "train":
        arguments = with_arms(arguments, groups("train"), is_sweep)
    arguments = overrides_together(arguments)
    if "hydra/launcher=parallel" in arguments:  # submitit starts all it is given: give it pairs
        arguments.insert(0, "hydra.sweeper.max_batch_size=2")
    if "hydra/launcher=ray_local" in arguments:
        os.environ.update(RAY_KEEPS_TO_ITSELF)
    sweep = _check_sweep(program, arguments) if is_sweep else None
    if sweep is not None and not any(a.startswith("sweep_name=") for a in arguments):
        # The default is the time, and it is later by now.
        arguments.insert(0, f"sweep_name={sweep.folder.name}")
    if sweep is not None and program.before_sweep is not None:
        program.before_sweep(sweep)
    exit_codes: list[int] = []  # of jobs in this process: a launcher may start others

    def run_job(config: DictConfig) -> None:
        run = HydraConfig.get()
        job = Job(
            {k: v for k, v in run.runtime.choices.items() if not k.startswith("hydra/")},
            list(run.overrides.task),
            Path(run.sweep.dir) if run.mode == RunMode.MULTIRUN else None,
        )
        # Nothing but an interrupt may leave: Hydra would add lines of its own.
        try:
            settings = as_settings(config)
            put_verbatim(settings, verbatim)
            exit_codes.append(program.run(program.resolve(settings, job.choices), job))
        except (UserError, TrainingError) as error:
            say_error(str(error))
            exit_codes.append(error.exit_code)
        except Exception:
            traceback.print_exc()
            exit_codes.append(1)

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=program.config_name)(
        run_job
    )()
    if sweep is not None and program.after_sweep is not None:
        exit_codes.append(program.after_sweep(sweep))
    return max(exit_codes, default=0)


def _check_sweep(program: Program, arguments: list[str]) -> Sweep:
    """Compose and check every job of a sweep before the first starts."""
    if machine.world_size() > 1:
        raise UserError(
            "-m: a sweep starts its own jobs; run it without torchrun, or one job per torchrun"
        )
    overrides = [a for a in arguments if is_setting(a)]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):

        def compose(lines: list[str]) -> DictConfig:
            return hydra.compose(program.config_name, lines, return_hydra_config=True)

        parser = OverridesParser.create()
        parsed = parser.parse_overrides(overrides)
        plain = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        hydra_config = compose(plain).hydra
        if str(hydra_config.launcher.get("_target_")).endswith(".SlurmLauncher"):
            _require_slurm()
        choices = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [str(o.input_line)]
            for o in parsed
        ]
        jobs = list(itertools.product(*choices))
        names: list[str | None] = []
        checked: list[tuple[Any, Mapping[str, str | None]]] = []
        folders: list[Path] = []
        for job in jobs:
            config = compose(list(job))
            runtime_choices = dict(config.hydra.runtime.choices)
            folders.append(Path(config.hydra.sweep.dir))
            del config.hydra
            settings = program.resolve(as_settings(config), runtime_choices)
            names.append(getattr(settings, "run_name", None))
            checked.append((settings, runtime_choices))
    shared = {name for name in names if name is not None and names.count(name) > 1}
    if shared:
        raise UserError(f"run_name={min(shared)}: {len(jobs)} jobs would share it; leave it out")
    study = runtime_choices["experiment"] if runtime_choices.get(ARM) else None
    if study is None and (taken := [folder for folder in folders if folder.exists()]):
        raise UserError(f"sweep_name={taken[0].name}: {taken[0]} is there already; give another")
    command = shlex.join(["python", f"{program.config_name}.py", *sys.argv[1:]])
    return Sweep(folders[0], study, checked, command)


def _require_slurm() -> None:
    if which("srun") is None:
        raise UserError("hydra/launcher: no srun here; give the command where SLURM is")


def explain(error: Exception, config_name: str) -> str:
    """One line for a mistake that Hydra or OmegaConf found, naming the setting as typed."""
    text = str(error)
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) else ""
    if re.search(r"Could not (find|load) .hydra/launcher", text):
        return (
            f"{text.splitlines()[0]}: if it is a plugin, install it: pip install -e '.[launchers]'"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1].split("@")[0]
        inner = re.search(r"Key '([^']+)'", detail)
        if inner and inner[1] != key.split(".")[-1]:  # group={key: value}
            key = f"{key}.{inner[1]}"
        return f"{key}: {unknown(key, config_name)}"
    if match := re.search(r"Error merging override (.+)", text):
        if "ListConfig" in detail:
            detail = "give a list, [a,b]"
        if "Cannot convert 'dict'" in detail:
            detail = f"{match[1].split('.')[0]} takes one value, it has no parts"
        return f"{match[1]}: {detail or 'not a usable value'}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: several values; add -m to run each of them, or [..] for a list"
    if match := re.search(r"Error parsing override '(.+)'", text):
        return f"{match[1]}: cannot be read as setting=value; quote values with special characters"
    return " ".join(f"{text} {detail}".split())
