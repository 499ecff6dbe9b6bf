"""What a sweep or study is to run: checked, priced, and which run goes on from which.

A plain sweep finds its runs by their settings. Of a study, ``<sweep>/<arm>_s<seed>/`` is a run like
any other. Designs that are run into one folder share the arms that they both name, if the settings
are the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qat.errors import UserError
from qat.golf.bundle import count_code_bytes
from qat.runs.result import SEEDS, Result, conditions, differing
from qat.runs.run_folder import (
    kept_steps,
    read_config,
    run_folders,
    write_atomically,
)
from qat.settings.command_line import Start
from qat.settings.schema import (
    StoreSettings,
    StudySettings,
    TrainSettings,
    from_yaml,
)
from qat.study.forks import find_forks, kept_by
from qat.study.prices import Prices, given, measure
from qat.text.source import absolute_paths

if TYPE_CHECKING:
    from qat.settings.command_line import Sweep

log = logging.getLogger("qat")

SUFFIX, PRICES_SUFFIX = ".study.json", ".prices.json"
MULTIRUN = "multirun.yaml"  # of Hydra, in every sweep's folder


@dataclass
class Study:
    """``<name>.study.json`` in a sweep's folder: the design, and how it was asked for."""

    name: str
    settings: StudySettings
    arms: list[str]  # that were asked for
    commands: list[str]

    @staticmethod
    def read(path: Path) -> Study:
        """UserError if it is not a study's file of this version."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            stores = said["settings"].pop("stores")
            settings = StudySettings(**said.pop("settings"))
            settings.stores = {name: StoreSettings(**store) for name, store in stores.items()}
            return Study(settings=settings, **said)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a study of this version ({error})") from None


def study_file(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def begin(sweep: Sweep) -> list[Start]:
    """Before the first run: say in the folder which study it is, beside the arms and commands given
    before, and at which prices; how each run is started. UserError if a run of it is there that was
    another."""
    there = list(_runs_in(sweep.folder))
    if sweep.study is None:
        _check_plain(sweep, there)
        _check_seeds_differ(there, [s for s, _ in sweep.jobs])
        return [Start() for _ in sweep.jobs]
    settings: StudySettings = sweep.jobs[0][0].study  # the design, and what was typed beside it
    path = study_file(sweep.folder, sweep.study)
    known = Study.read(path) if path.is_file() else Study(sweep.study, settings, [], [])
    jobs = [(str(choices["arm"]), s) for s, choices in sweep.jobs]
    for arm, s in jobs:
        _check_prices_are_asked(s, arm)
    _check_named_once(jobs)
    list_of_prices = sweep.folder / f"{sweep.study}{PRICES_SUFFIX}"
    prices = prices_of(list_of_prices, jobs, settings.baseline)
    if prices is not None:
        jobs = [(arm, at_price(s, prices, arm)) for arm, s in jobs]
    _check_same(sweep.folder, jobs, there)
    _check_seeds_differ(there, [s for _, s in jobs])
    asked = dict.fromkeys([*known.arms, *(arm for arm, _ in jobs)])
    arms = sorted(asked, key=lambda arm: [*settings.arms, *asked].index(arm))
    commands = list(dict.fromkeys([*known.commands, sweep.command]))
    sweep.folder.mkdir(parents=True, exist_ok=True)
    study = Study(sweep.study, settings, arms, commands)
    if prices is not None:
        prices.write(list_of_prices)
    write_atomically(path, json.dumps(asdict(study), indent=1) + "\n")
    return _starts(sweep.folder, jobs, settings.baseline)


def prices_of(
    path: Path, jobs: Sequence[tuple[str, TrainSettings]], baseline: str
) -> Prices | None:
    """Of a study on a priced clock: given, else those of its file, else measured.

    None on the clock of the wall. UserError if they are of other arms, settings, another machine
    or code.
    """
    arms = dict(reversed(jobs))  # one seed of each will do
    design = jobs[0][1].study
    if design.clock != "priced":
        return None
    if design.prices:
        return given(arms, design.prices)
    if path.is_file():
        prices = Prices.read(path)
        if missing := [arm for arm in arms if arm not in prices.arms]:
            raise UserError(
                f"{path}: has no price of {missing[0]}; give another sweep_name, or the prices "
                "themselves: study.prices={ARM: 1.003}"
            )
        prices.check(path, arms)
        return prices
    if baseline not in arms:
        raise UserError(f"study.clock = priced: prices are in updates of {baseline}; add that arm")
    return measure(arms, baseline, Console(stderr=True))


def at_price(s: TrainSettings, prices: Prices, arm: str) -> TrainSettings:
    """The run, ended by counting what its updates cost."""
    steps = s.max_steps
    if s.budget_seconds is not None:
        if prices.update_seconds is None:
            raise UserError(
                f"budget_seconds = {s.budget_seconds:g}: study.prices say nothing of seconds; give "
                "budget_seconds=null max_steps=N, in updates of the baseline"
            )
        bought = math.ceil(s.budget_seconds / prices.update_seconds)
        steps = bought if steps is None else min(steps, bought)
    price = prices.arms[arm]
    schedule = replace(s.schedule, update_price=price.before, qat_update_price=price.after)
    return replace(s, max_steps=steps, budget_seconds=None, schedule=schedule)


def priced_alone(s: TrainSettings, arm: str) -> TrainSettings:
    """A run of a study on a priced clock, outside a sweep: at the price that is given, or that a
    sweep gave it. UserError if there is none."""
    if not s.qat.enabled or {s.schedule.update_price, s.schedule.qat_update_price} != {1.0}:
        return s
    if not s.study.prices:
        raise UserError(
            f"study.clock = priced: one run cannot time its price; give study.prices={{{arm}: "
            "PRICE}, or -m"
        )
    return at_price(s, given({arm: s}, s.study.prices), arm)


def _starts(folder: Path, jobs: Sequence[tuple[str, TrainSettings]], baseline: str) -> list[Start]:
    """Trunks before what goes on from them, with the settings that are not typed."""
    runs = {run_name(arm, s.seed): s for arm, s in jobs}
    first = sorted(runs, key=lambda name: not name.startswith(f"{baseline}_s"))

    def last_kept(name: str, step: int) -> int:
        """Or that will be. What was trained to bytes is of the code that was counted then."""
        row = Result.read(folder / name)
        if row is None or row.status == "failed":
            return step
        if runs[name].qat.to_bytes and row.code_bytes != count_code_bytes():
            return 0
        return max((kept for kept in kept_steps(folder / name) if kept <= step), default=0)

    forks = find_forks({name: runs[name] for name in first}, last_kept)
    starts = []
    for name, s in runs.items():
        overrides = []
        if s.study.clock == "priced":
            overrides = ["budget_seconds=null", f"max_steps={s.max_steps}"]
            for key in ("update_price", "qat_update_price"):
                overrides.append(f"schedule.{key}={getattr(s.schedule, key)!r}")
        if (fork := forks.get(name)) is not None:
            overrides += [f"fork.run={fork.run}", f"fork.step={fork.step}"]
        if kept := kept_by(name, forks):
            overrides.append(f"fork.keep_steps={kept}".replace(" ", ""))
        after = None if fork is None else list(runs).index(fork.run)
        starts.append(Start(after, overrides))
    if forks:
        shared = sum(fork.step for fork in forks.values())
        log.info("%d of %d runs go on from others: %d updates shared", len(forks), len(runs),
                 shared)  # fmt: skip
    return starts


def _check_seeds_differ(there: Sequence[SavedRun], asked: Sequence[TrainSettings]) -> None:
    """UserError if two seeds are one run: with weights and order of text given, nothing is left for
    them."""
    first: dict[str, int] = {}
    for s in (*(saved for _, saved, _ in there), *asked):
        if s.model.init_from is None:
            continue
        settings = conditions(asdict(_as_saved(s)))
        del settings["seed"]
        other = first.setdefault(json.dumps(settings, sort_keys=True), s.seed)
        if other != s.seed:
            raise UserError(
                f"seed={other},{s.seed}: both begin with the weights of model.init_from and read "
                f"the same text (data_seed = {s.data_seed}); give 'data_seed=${{seed}}' too"
            )


def _check_named_once(jobs: Sequence[tuple[str, TrainSettings]]) -> None:
    """A study's run is an arm and a seed. UserError if two jobs are one run."""
    first: dict[str, TrainSettings] = {}
    for arm, s in jobs:
        other = first.setdefault(name := run_name(arm, s.seed), s)
        if other is not s:
            unlike = differing(_by_name(other), _by_name(s))[0]
            raise UserError(
                f"{unlike}: two runs of arm {arm} and seed {s.seed} would differ in it and share "
                f"{name}/; give each value a sweep_name, or arms"
            )


def _check_prices_are_asked(s: TrainSettings, arm: str) -> None:
    if s.study.prices and s.study.clock != "priced":
        raise UserError("study.prices: only with study.clock=priced")
    for key in ("update_price", "qat_update_price"):
        if getattr(s.schedule, key) != 1.0:
            raise UserError(f"schedule.{key}: arm {arm} has its price from study.prices")


def _as_saved(s: TrainSettings) -> TrainSettings:
    """As a run's config.yaml keeps them."""
    return replace(s, data=absolute_paths(s.data))


def _by_name(s: TrainSettings) -> dict[str, Any]:
    """Every setting, by dotted name."""
    return conditions(asdict(s), bookkeeping=())


SavedRun = tuple[Path, TrainSettings, dict[str, str | None]]  # its settings and choices


def _runs_in(folder: Path) -> Iterator[SavedRun]:
    """The runs of a sweep."""
    for run in run_folders(folder) if folder.exists() else ():
        config, choices = read_config(run, "sweep_name")
        yield run, from_yaml(config, str(run)), choices


def _check_plain(sweep: Sweep, there: Sequence[SavedRun]) -> None:
    """UserError if the folder is not this sweep's: every run that is there is one of its own."""
    folder = sweep.folder
    if folder.exists() and not (folder / MULTIRUN).is_file():
        raise UserError(f"sweep_name={folder.name}: {folder} is there already; give another")
    asked = [_by_name(_as_saved(settings)) for settings, _ in sweep.jobs]
    for run, saved, _ in there:
        of_run = _by_name(saved)
        unlike = min((differing(of_run, of_job) for of_job in asked), key=len)
        if unlike:
            raise UserError(
                f"sweep_name={folder.name}: {run.name} was run there with {unlike[0]} = "
                f"{of_run.get(unlike[0])}, which is none of these runs; give another sweep_name"
            )


def folder_of(s: TrainSettings, sweep_dir: Path) -> Path | None:
    """Where a plain sweep has run these settings, if it has."""
    asked = _by_name(_as_saved(s))
    return next((run for run, saved, _ in _runs_in(sweep_dir) if _by_name(saved) == asked), None)


def studies_in(folder: Path) -> list[Study]:
    """Those that sweeps left there; else that of runs put there one by one.

    UserError if there is none.
    """
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        return [Study.read(file) for file in files]
    studies: dict[str, Study] = {}
    for run in run_folders(folder):
        config, choices = read_config(run, "study")
        name, arm = choices.get("experiment"), choices.get("arm")
        if name and arm:
            if name not in studies:
                studies[name] = Study(name, from_yaml(config, str(run)).study, [], [])
            if arm not in studies[name].arms:
                studies[name].arms.append(arm)
    if not studies:
        raise UserError(f"study={folder}: no study there; give the folder of a study's sweep")
    return [*studies.values()]


def run_name(arm: str, seed: int) -> str:
    return f"{arm}_s{seed}"


def _check_same(
    folder: Path, jobs: Sequence[tuple[str, TrainSettings]], there: Sequence[SavedRun]
) -> None:
    """UserError if an arm was run in the study's folder, or is asked for, with other settings: its
    seeds are taken together. Of a run that is there, all of them are asked for again."""
    of_arms: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run, saved, choices in there:
        found = run.name, conditions(asdict(saved))
        of_arms.setdefault(str(choices.get("arm")), []).append(found)
    first: dict[str, dict[str, Any]] = {}
    for arm, s in jobs:
        asked = conditions(asdict(_as_saved(s)))
        name = run_name(arm, s.seed)
        for of_run, settings in of_arms.get(arm, ()):
            for key in differing(settings, asked, () if of_run == name else SEEDS):
                raise UserError(
                    f"sweep_name={folder.name}: {of_run} was run there with {key} = "
                    f"{settings.get(key)}, not {asked.get(key)}; give another sweep_name"
                )
        for key in differing(first.setdefault(arm, asked), asked, SEEDS):
            raise UserError(
                f"sweep_name={folder.name}: {name} is asked for with {key} = "
                f"{first[arm].get(key)} and {asked.get(key)}; give each a sweep_name"
            )
