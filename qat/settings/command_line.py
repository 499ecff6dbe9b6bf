"""From argv to checked settings to an exit code, with Hydra doing the composing.

What Hydra does not do and users expect: ``profile=auto`` is replaced before composition; every
mistake ends in one line and exit code 2; unknown keys added with ``+`` are refused; all jobs of a
sweep are checked before the first one starts; only rank 0 speaks.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat.errors import TrainingError, UserError
from qat.settings import machine, options
from qat.settings.arguments import (
    SCHEMAS,
    check_settings,
    groups,
    quoted,
    split_flags,
    users_folders,
    with_profile,
)
from qat.settings.arms import ARM, with_arms
from qat.settings.schema import as_settings

SWEEPER = "hydra_plugins.qat_sweeper.CheckedSweeper"
INTERRUPTED = 130  # as shells say it
SECONDS_TO_SPEAK = 10.0  # rank 0 may be slower; it is hardly ever more than one


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
    try:
        exit_code = _main(program)
        if exit_code:
            _let_rank_0_speak()
        return exit_code
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # of ``--help | head``; what is left to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        say_error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        say_error(explain(error))
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


def register(users_folders: list[Path]) -> None:
    """Tell Hydra what is in no file of ``conf/``."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"{name}_schema", schema)
    store.store("checked", BasicSweeperConf(SWEEPER, params={}), "hydra/sweeper")
    options.look_also_in(users_folders)


def _main(program: Program) -> int:
    name, typed = program.config_name, sys.argv[1:]
    settings, flags, args = split_flags(typed, name)
    if name == "eval":
        settings = quoted(settings)
    register(folders := users_folders(args.config_dir, settings))
    if not args.shell_completion:  # its words are no settings
        check_settings(settings, name)
    if name == "train":
        # Hydra's own settings have no profile, and a run that goes on takes its own.
        if not args.hydra_help and not any(word.startswith("resume=") for word in settings):
            is_question = args.help or args.cfg or args.info or args.shell_completion
            settings = with_profile(settings, say=not is_question)
        is_sweep = args.multirun or "hydra.mode=MULTIRUN" in settings
        settings = with_arms(settings, groups(name), is_sweep)
    sys.argv[1:] = [*settings, *flags]
    jobs = Jobs(program, folders, shlex.join(["python", f"{name}.py", *typed]))
    hydra.main(version_base="1.3", config_path=str(options.CONF), config_name=name)(jobs)()
    return max(jobs.exit_codes, default=0)


@dataclass
class Jobs:
    """What Hydra calls for each job, here or, pickled, in a launcher's process."""

    program: Program
    users_folders: list[Path]
    command: str  # as typed
    exit_codes: list[int] = field(default_factory=list)  # of this process

    def __call__(self, config: DictConfig) -> None:
        options.look_also_in(self.users_folders)
        run = HydraConfig.get()
        job = Job(
            _choices(run),
            list(run.overrides.task),
            Path(run.sweep.dir) if run.mode == RunMode.MULTIRUN else None,
        )
        # Nothing but an interrupt may leave: Hydra would add lines of its own.
        try:
            settings = self.program.resolve(as_settings(config), job.choices)
            self.exit_codes.append(self.program.run(settings, job))
        except (UserError, TrainingError) as error:
            say_error(str(error))
            self.exit_codes.append(error.exit_code)
        except Exception:
            traceback.print_exc()
            self.exit_codes.append(1)

    def begin_sweep(self, folder: Path, configs: list[DictConfig]) -> Sweep:
        """Check every job, before the first starts."""
        if self.program.after_sweep is None:
            name = self.program.config_name
            raise UserError(f"-m: {name}.py does one thing at a time; drop -m")
        if machine.world_size() > 1:
            raise UserError(
                "-m: a sweep starts its own jobs; run it without torchrun, or one job per torchrun"
            )
        jobs: list[tuple[Any, Mapping[str, str | None]]] = []
        asked: list[list[str]] = []
        for config in configs:
            choices, taken = _choices(config.hydra), Path(config.hydra.sweep.dir)
            study = choices["experiment"] if choices.get(ARM) else None
            if study is None and taken.exists():
                raise UserError(f"sweep_name={taken.name}: {taken} is there already; give another")
            asked.append(list(config.hydra.overrides.task))
            del config.hydra
            jobs.append((self.program.resolve(as_settings(config), choices), choices))
            if (first := jobs.index(jobs[-1])) < len(jobs) - 1:
                other = " ".join(one for one in asked[first] if one not in asked[-1])
                again = " ".join(one for one in asked[-1] if one not in asked[first])
                raise UserError(f"{again}: the same run as {other}; give one of them")
        names = [getattr(settings, "run_name", None) for settings, _ in jobs]
        if shared := {name for name in names if name is not None and names.count(name) > 1}:
            raise UserError(
                f"run_name={min(shared)}: {len(jobs)} jobs would share it; leave it out"
            )
        sweep = Sweep(folder, study, jobs, self.command)
        if self.program.before_sweep is not None:
            self.program.before_sweep(sweep)
        return sweep

    def end_sweep(self, sweep: Sweep) -> None:
        assert self.program.after_sweep is not None
        self.exit_codes.append(self.program.after_sweep(sweep))


def _choices(of_hydra: Any) -> dict[str, str | None]:
    return {k: v for k, v in of_hydra.runtime.choices.items() if not k.startswith("hydra/")}


def explain(error: Exception) -> str:
    """One line for a mistake that Hydra or OmegaConf found, naming the setting as typed."""
    text = str(error)
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) else ""
    if re.search(r"Could not (find|load) .hydra/launcher", text):
        return (
            f"{text.splitlines()[0]}: if it is a plugin, install it: pip install -e '.[launchers]'"
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: no such option; choose from {', '.join(error.options)}"
    if match := re.match(r"In '(.+)': \w+ raised while composing config:\n(.+)", text):
        key = re.search(r"full_key: (\S+)", text)
        return f"{match[1]}.yaml: {key[1] if key else 'it'}: {match[2]}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: not there yet; add it, +{match[1]}=..."
    if match := re.search(r"Multiple values for (\S+)\.", text):
        return f"{match[1]}: it has a place already; give it once, without '+'"
    if match := re.search(r"Error merging override (.+)", text):
        if "ListConfig" in detail:
            detail = "give a list, [a,b]"
        return f"{match[1]}: {detail or 'not a usable value'}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: several values; add -m to run each of them, or [..] for a list"
    if match := re.search(r"Error parsing override '(.+)'", text):
        return f"{match[1]}: cannot be read as setting=value; quote values with special characters"
    return " ".join(f"{text} {detail}".split())
