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
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from qat.errors import PreemptedError, TrainingError, UserError, of_system
from qat.settings import machine, options
from qat.settings.arguments import (
    SCHEMAS,
    check_settings,
    groups,
    opened,
    split_flags,
    users_folders,
    with_profile,
    with_source,
)
from qat.settings.arms import ARM, with_arms
from qat.settings.schema import as_settings
from qat.settings.signals import when_asked_to_stop
from qat.settings.typed import kinds, plain_number, spelled

SWEEPER = "hydra_plugins.qat_sweeper.CheckedSweeper"
INTERRUPTED = 130  # as shells say it
SECONDS_TO_SPEAK = 10.0  # rank 0 may be slower; it is hardly ever more than one
_unsaid: list[str] = []  # errors of a rank that is not 0


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

    @property
    def command_to_go_on(self) -> str:
        """The same, with the name that was made of the time."""
        is_named = self.study is not None or re.search(r"\bsweep_name=", self.command)
        return self.command if is_named else f"{self.command} sweep_name={self.folder.name}"


@dataclass(frozen=True)
class Start:
    """How a job of a sweep is started, beside what was typed."""

    after: int | None = None  # the number of the job that has to end first
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """train.py or eval.py: ``resolve`` completes settings, ``run`` returns an exit code."""

    config_name: str
    resolve: Callable[[Any, Mapping[str, str | None]], Any]
    run: Callable[[Any, Job], int]
    before_sweep: Callable[[Sweep], list[Start]] | None = None  # of each job
    after_sweep: Callable[[Sweep], int] | None = None


def main(program: Program) -> int:
    """Compose, check and run; returns the exit code. What goes wrong in a run stays in ``run``."""
    machine.speak_utf8()
    machine.keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of exiting with 1
    try:
        machine.check_ranks()
    except UserError as error:  # who is rank 0 is not known
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if waited_for := machine.ranks_without_torchrun():
        print(waited_for, file=sys.stderr)
    try:
        with when_asked_to_stop():
            exit_code = _main(program)
        if exit_code:
            _let_rank_0_speak()
        return exit_code
    except PreemptedError as stopped:
        say_error(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # of ``--help | head``; what is left to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        say_error(str(error))
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        say_error(explain(error))
    except OSError as error:  # Hydra makes the sweep's folder
        say_error(f"runs_dir: cannot write {error.filename or 'there'} ({error.strerror})")
    _let_rank_0_speak()
    return UserError.exit_code


def _let_rank_0_speak() -> None:
    """torchrun ends all ranks when the first one fails, and a mistake fails all of them at once.
    A rank that is not ended by then has met something that rank 0 did not."""
    if machine.rank() != 0:
        time.sleep(SECONDS_TO_SPEAK)
        for line in _unsaid:
            print(f"error: rank {machine.rank()}: {line}", file=sys.stderr)
        _unsaid.clear()


def say_error(line: str) -> None:
    if machine.rank() == 0:
        print(f"error: {line}".replace("\n", "\\n"), file=sys.stderr)
    else:
        _unsaid.append(line)


def register(users_folders: list[Path]) -> None:
    """Tell Hydra what is in no file of ``conf/``."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"{name}_schema", schema)
    store.store("checked", BasicSweeperConf(SWEEPER, params={}), "hydra/sweeper")
    options.look_also_in(users_folders)


def _main(program: Program) -> int:
    name, typed = program.config_name, sys.argv[1:]
    try:
        here = os.getcwd()
    except OSError as error:
        raise UserError(f"the folder that this was started in is gone ({error.strerror})") from None
    for word in (*typed, here):
        if not word.isprintable() and re.search("[\udc80-\udcff]", word):
            raise UserError(f"{word}: not a name in UTF-8, which settings are saved in; rename it")
    settings, flags, args = split_flags(typed, name)
    is_sweep = args.multirun or "hydra.mode=MULTIRUN" in settings

    def for_hydra() -> list[str]:
        return spelled(settings, kinds(SCHEMAS[name]), groups(name), is_sweep)

    register(folders := users_folders(args.config_dir, for_hydra()))
    if not args.shell_completion:  # its words are no settings
        check_settings(for_hydra(), name)
    if name == "train":
        # Hydra's own settings have no profile, and a run that goes on takes its own.
        if not args.hydra_help and not any(word.startswith("resume=") for word in settings):
            is_question = args.help or args.cfg or args.info or args.shell_completion
            settings = with_profile(settings, say=not is_question)
        if not args.shell_completion:
            settings = with_source(settings, for_hydra())
        settings = with_arms(settings, groups(name), is_sweep)
    sys.argv[1:] = [*opened(for_hydra(), name), *flags]
    jobs = Jobs(program, folders, shlex.join(["python", f"{name}.py", *typed]))
    try:
        hydra.main(version_base="1.3", config_path=str(options.CONF), config_name=name)(jobs)()
    except (PreemptedError, KeyboardInterrupt):
        if jobs.sweep is not None:
            print(f"go on with: {jobs.sweep.command_to_go_on}", file=sys.stderr)
        raise
    return max(jobs.exit_codes, default=0)


@dataclass
class Jobs:
    """What Hydra calls for each job, here or, pickled, in a launcher's process."""

    program: Program
    users_folders: list[Path]
    command: str  # as typed
    exit_codes: list[int] = field(default_factory=list)  # of this process
    sweep: Sweep | None = None
    process: int = field(default_factory=os.getpid)  # where the command was typed

    def __call__(self, config: DictConfig) -> None:
        if os.getpid() != self.process:
            options.look_also_in(self.users_folders)
        run = HydraConfig.get()
        job = Job(
            _choices(run),
            _as_asked(run),
            Path(run.sweep.dir) if run.mode == RunMode.MULTIRUN else None,
        )
        # Nothing but an interrupt may leave: Hydra would add lines of its own.
        try:
            with when_asked_to_stop():  # a launcher has other ideas
                settings = self.program.resolve(as_settings(config), job.choices)
                self.exit_codes.append(self.program.run(settings, job))
        except PreemptedError as stopped:
            if os.getpid() == self.process:
                raise
            self.exit_codes.append(stopped.exit_code)  # of a launcher's job; its sweep may go on
        except (UserError, TrainingError) as error:
            say_error(str(error))
            self.exit_codes.append(error.exit_code)
        except OmegaConfBaseException as error:  # it refers to what is not there
            say_error(explain(error))
            self.exit_codes.append(UserError.exit_code)
        except BrokenPipeError:
            raise
        except OSError as error:  # the disk is full, or a file or folder is not ours
            say_error(of_system(error))
            self.exit_codes.append(UserError.exit_code)
        except Exception:
            if machine.rank() == 0:
                traceback.print_exc()
            else:
                say_error(traceback.format_exc())
            self.exit_codes.append(1)

    def begin_sweep(self, folder: Path, configs: list[DictConfig]) -> tuple[Sweep, list[Start]]:
        """Check every job, before the first starts; how each is started."""
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
            choices = _choices(config.hydra)
            study = choices["experiment"] if choices.get(ARM) else None
            asked.append(_as_asked(config.hydra))
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
        self.sweep = sweep = Sweep(folder, study, jobs, self.command)
        if self.program.before_sweep is None:
            return sweep, [Start() for _ in jobs]
        return sweep, self.program.before_sweep(sweep)

    def end_sweep(self, sweep: Sweep) -> None:
        assert self.program.after_sweep is not None
        self.exit_codes.append(self.program.after_sweep(sweep))


def _as_asked(of_hydra: Any) -> list[str]:
    """Overrides of a job; what they refer to is not looked up."""
    return OmegaConf.to_container(of_hydra.overrides.task, resolve=False)  # type: ignore[return-value]


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
        value = re.match(r"Value '(.+)' of type 'str' could not", match[2])
        remedy = plain_number(f"{key[1]}={value[1]}") if key and value else ""
        if key and key[1] == match[1].split("/")[0]:
            remedy = "; its first line has to be '# @package _global_'"
        return f"{match[1]}.yaml: {key[1] if key else 'it'}: {match[2]}{remedy}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: not there yet; add it, +{match[1]}=..."
    if match := re.search(r"Multiple values for (\S+)\.", text):
        return f"{match[1]}: it has a place already; give it once, without '+'"
    if match := re.search(r"Error merging override (.+)", text):
        if "ListConfig" in detail:
            detail = "give a list, [a,b]"
        if "could not be converted" in detail:
            detail += plain_number(match[1])
        if "is not Optional" in detail:
            detail = "give a value, not null"
        return f"{match[1]}: {detail or 'not a usable value'}"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: several values; add -m to run each of them, or [..] for a list"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"{mark.name}, line {mark.line + 1}: not YAML ({error.problem})"
    if isinstance(error, YAMLError | UnicodeDecodeError):
        reason = " ".join(str(error).split())
        return f"a .yaml file of --config-dir or hydra.searchpath is not UTF-8 text ({reason})"
    if isinstance(error, OverrideParseException):
        remedy = "quote values with special characters"
        return f"{error.override or repr('')}: cannot be read as setting=value; {remedy}"
    if match := re.match(r"(.+)\n +full_key: (\S+)", text):
        return f"{match[2].replace('hydra.sweep.dir', 'runs_dir, sweep_name')}: {match[1]}"
    return " ".join(f"{text} {detail}".split())
