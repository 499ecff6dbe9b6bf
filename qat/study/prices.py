"""What an update of each arm takes, in updates of the baseline: the price list of a priced clock.

All arms take their updates in turn on this machine, each between two of the baseline's, on random
tokens; an arm's price is the median of its times over the mean of its neighbours'. So what slows
the machine slows both. An arm whose updates before the switch do what the baseline's do has the
same price there, by construction. Not priced: files that training to bytes encodes a few times.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from scipy.stats import binom
from torch import Tensor

from qat.budget.budget import Budget
from qat.budget.price_control import File, PriceControl
from qat.errors import UserError
from qat.quantize.gradients import rule_kinds
from qat.runs import provenance
from qat.runs.result import conditions, differing
from qat.runs.run_folder import write_atomically
from qat.runs.teacher import open_teacher
from qat.settings.schema import TrainSettings
from qat.training.averaging import Averaging
from qat.training.build import build_model, plan_of, spec_of
from qat.training.fit import build_loop
from qat.training.to_bytes import TrainToBytes

KNOWN_TO = 0.003  # half the width of a price's interval
SECONDS_PER_ARM = 60.0
FEWEST_PAIRS = 20
WARM_UPDATES = 3
# Among given prices those of all arms that are not named: with plain QAT, trained to their bytes,
# with a teacher. So is the name of a gradient rule, and learned scales are one.
PLAIN, TO_BYTES, DISTILLED, LEARNED = "qat", "to_bytes", "distill", "learned"
PLAIN_RULE = "identity"
FIRST_QAT_STEP = 1  # training to bytes looks at the gradients of one update first
NEVER = 10**9
TRAINING = ("quantize", "model", "budget", "training", "qat_model.py", "compiled.py")
# Settings, and groups of them, that say what an update takes; some of them with QAT on alone.
COSTLY = (
    "model", "batch_tokens", "micro_batch_tokens", "seq_len", "precision", "compile",
    "optimizer.name", "optimizer.newton_schulz_dtype", "averaging.kind", "averaging.of",
    "averaging.every_steps",
)  # fmt: skip
COSTLY_OF_QAT = ("qat", "grid", "plan")
FREE = (  # among these: names, when QAT is on, how strongly its rule pulls
    "model.init_from", "qat.grid", "qat.plan", "qat.start_step", "qat.start_fraction",
    "qat.start_lr_scale", "qat.stop_step", "qat.default_start_fraction", "qat.gradient_strength",
)  # fmt: skip


@dataclass(frozen=True)
class Price:
    """In updates of the baseline; ``low`` and ``high``: 95 % interval of the median ``after``."""

    before: float = 1.0
    after: float = 1.0
    low: float | None = None
    high: float | None = None
    pairs: int = 0  # of updates that were compared


@dataclass(frozen=True)
class Prices:
    hardware: str
    training_code: str  # a hash of it
    update_seconds: float | None  # of the baseline; None if prices were given
    arms: dict[str, Price]
    timed_with: dict[str, dict[str, Any]]  # of each arm ``what_costs``; empty if prices were given

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Prices:
        """UserError if it is damaged, or was made on another machine or by other code."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            arms = {arm: Price(**price) for arm, price in said.pop("arms").items()}
            found = Prices(arms=arms, **said)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not prices of this version ({error})") from None
        for what, theirs, ours in (
            ("on another machine", found.hardware, provenance.hardware(1)),
            ("by other code", found.training_code, training_code()),
        ):
            if found.update_seconds is not None and theirs != ours:
                raise UserError(
                    f"{path}: updates were timed {what} ({theirs}); give another sweep_name, or "
                    "the prices themselves: study.prices={ARM: 1.003}"
                )
        return found

    def check(self, path: Path, arms: Mapping[str, TrainSettings]) -> None:
        """UserError, naming ``path``, if updates of one of the arms cost something else now."""
        for arm, s in arms.items():
            ours = what_costs(s)
            theirs = self.timed_with.get(arm, ours)
            for name in differing(theirs, ours):
                raise UserError(
                    f"{path}: updates of {arm} were timed with {name} = {theirs.get(name)}, not "
                    f"{ours.get(name)}; give another sweep_name, or the prices themselves: "
                    "study.prices={ARM: 1.003}"
                )


def training_code() -> str:
    """A hash of the code that an update runs."""
    return provenance.hash_of_code(TRAINING)


def what_costs(s: TrainSettings) -> dict[str, Any]:
    """What decides how long an update takes, by dotted name."""
    costly = tuple(f"{name}." for name in COSTLY + COSTLY_OF_QAT * s.qat.enabled)
    return {
        name: value
        for name, value in conditions(asdict(s)).items()
        if f"{name}.".startswith(costly) and name not in FREE
    }


def kind_of(s: TrainSettings) -> str | None:
    """What decides the price of an arm with QAT; None if several things do."""
    kinds = {
        TO_BYTES: s.qat.to_bytes,
        LEARNED: s.grid.scale_rule == "learned" and not s.qat.to_bytes,  # which learns them anyway
        DISTILLED: s.qat.distill.weight > 0.0,
    }
    found = {kind for kind, holds in kinds.items() if holds} | {s.qat.gradient} - {PLAIN_RULE}
    return PLAIN if not found else found.pop() if len(found) == 1 else None


def given(arms: Mapping[str, TrainSettings], prices: Mapping[str, Any]) -> Prices:
    """Prices as ``study.prices`` says them: a number, or [before the switch, after it], of an arm
    or of all of a kind. UserError if an arm with QAT has none."""
    kinds = [PLAIN, TO_BYTES, DISTILLED, *(rule for rule in rule_kinds() if rule != PLAIN_RULE)]
    known = dict.fromkeys([*arms, *(arm for s in arms.values() for arm in s.study.arms)])
    named: dict[str, Price] = {}
    for name, said in prices.items():
        pair = said if isinstance(said, list) else [1.0, said]
        numbers = [p for p in pair if isinstance(p, int | float) and 0 < p < math.inf]
        if name not in known and name not in kinds:
            raise UserError(
                f"study.prices.{name}: no such arm; choose from {', '.join(known)}, or for all "
                f"arms of a kind from {', '.join(kinds)}"
            )
        if len(numbers) != 2 or len(pair) != 2:
            raise UserError(f"study.prices.{name} = {said}: give a price, or [before, after]")
        named[name] = Price(before=float(numbers[0]), after=float(numbers[1]))
    found = {}
    for arm, s in arms.items():
        kind = kind_of(s) if s.qat.enabled else None
        price = named.get(arm) or (named.get(kind) if kind else None)
        if s.qat.enabled and price is None:
            of_kind = f", or {kind}: PRICE, that of every such arm" if kind else ""
            raise UserError(
                f"study.prices: arm {arm} trains with QAT and has no price; give "
                f"{arm}: PRICE{of_kind}"
            )
        found[arm] = price or Price()
    return Prices(provenance.hardware(1), training_code(), None, found, {})


def measure(arms: Mapping[str, TrainSettings], baseline: str, console: Console) -> Prices:
    """``arms``: name -> settings of one seed, the baseline among them."""
    base = arms[baseline]
    timed: dict[tuple[str, bool], _Updates] = {}  # (arm, whether QAT is on)
    for arm, s in arms.items():
        if arm != baseline and differing(_before_switch(s), _before_switch(base)):
            timed[arm, False] = _Updates(s, is_on=False)
        if s.qat.enabled:
            timed[arm, True] = _Updates(s, is_on=True)
    ratios = _race(_Updates(base, is_on=False), timed, console)
    found = {arm: Price() for arm in arms}
    for (arm, is_on), pairs in ratios.times.items():
        middle, low, high = median_interval(pairs)
        if is_on:
            found[arm] = replace(found[arm], after=middle, low=low, high=high, pairs=len(pairs))
        else:
            found[arm] = Price(middle, middle, low, high, len(pairs))
    for arm, price in found.items():
        if price.pairs:
            known = "" if _is_known(price.low, price.high) else " (not known to 0.3 %)"
            console.print(
                f"an update of {arm}: {price.after:.4f} of {baseline}'s, 95 % {price.low:.4f} to "
                f"{price.high:.4f}, {price.pairs} pairs{known}",
                highlight=False,
            )
    timed_with = {arm: what_costs(s) for arm, s in arms.items()}
    return Prices(provenance.hardware(1), training_code(), ratios.base_seconds, found, timed_with)


def _before_switch(s: TrainSettings) -> dict[str, Any]:
    """What an update without QAT costs."""
    return what_costs(replace(s, qat=replace(s.qat, enabled=False)))


@dataclass
class _Ratios:
    base_seconds: float
    times: dict[tuple[str, bool], list[float]]


def _race(base: _Updates, timed: Mapping[tuple[str, bool], _Updates], console: Console) -> _Ratios:
    """Updates in turn, until every price is known well enough or has had its time."""
    ratios: dict[tuple[str, bool], list[float]] = {key: [] for key in timed}
    spent = dict.fromkeys(timed, 0.0)
    for _ in range(WARM_UPDATES):
        for updates in (base, *timed.values()):
            updates.take()
    all_base = [base.take()]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("timing updates", total=SECONDS_PER_ARM * len(timed))
        while racing := [key for key in timed if not _has_ended(ratios[key], spent[key])]:
            for key in racing:
                started = len(all_base)
                if len(racing) == 1:  # else two of its pairs would share one: no more independent
                    all_base.append(base.take())
                ours = timed[key].take()
                all_base.append(base.take())
                ratios[key].append(ours / statistics.mean(all_base[-2:]))
                spent[key] += ours + sum(all_base[started:])
            left = sum(SECONDS_PER_ARM - spent[key] for key in racing)
            bar.update(task, completed=SECONDS_PER_ARM * len(timed) - left)
    if not timed:
        all_base += [base.take() for _ in range(FEWEST_PAIRS)]
    return _Ratios(statistics.median(all_base), ratios)


def _has_ended(pairs: list[float], seconds: float) -> bool:
    if len(pairs) < FEWEST_PAIRS:
        return False
    # Looked at after every pair, an interval would end the race when it is narrow by chance.
    is_looked_at = len(pairs) % FEWEST_PAIRS == 0
    return seconds >= SECONDS_PER_ARM or (is_looked_at and _is_known(*median_interval(pairs)[1:]))


def _is_known(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and high - low <= 2 * KNOWN_TO


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """(median, low, high) at 95 % or more: the narrowest pair of order statistics that holds the
    median so often, whatever the values are distributed like. Of fewer than 6 values: all of them.
    """
    ordered, count = sorted(values), len(values)
    # Below the median lie binomially many: fewer than ``low`` + 1 of them in 2.5 % at most.
    low = max(int(binom.ppf(0.025, count, 0.5)) - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


class _Updates:
    """One arm's loop, driven by hand; its settings but for when things start and end."""

    def __init__(self, s: TrainSettings, is_on: bool) -> None:
        qat = replace(
            s.qat, start_step=FIRST_QAT_STEP if is_on else NEVER, start_fraction=None,
            start_lr_scale=None, stop_step=None,
        )  # fmt: skip
        schedule = replace(s.schedule, warmdown_steps=0, warmdown_fraction=None, warmup_steps=0)
        s = replace(
            s, qat=qat, schedule=schedule, averaging=replace(s.averaging, start_fraction=0.0),
            budget_seconds=None, max_steps=NEVER,
        )  # fmt: skip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = plan_of(spec_of(s.model), s.grid, s.plan)
        hooks: list[Any] = [Averaging(**vars(s.averaging))]
        if s.qat.enabled and s.qat.to_bytes:
            file = File(s.limit_bytes, 0.0)
            hooks.append(TrainToBytes(PriceControl(
                plan, Budget(s.limit_bytes), s.batch_tokens, lambda *_: file, s.qat.bit_price
            )))  # fmt: skip
        module, teacher = build_model(s.model, s.seed), open_teacher(s)
        self.loop = build_loop(s, module, plan, hooks, teacher).to(self.device)
        rows = s.batch_tokens // s.seq_len // self.loop.pace.micro_batches
        text = torch.randint(s.model.vocab_size, (rows, s.seq_len + 1), device=self.device)
        self.batch = text[:, :-1], text[:, 1:]
        self.loop.configure_optimizers()
        self.loop.on_train_start()

    def take(self) -> float:
        """Seconds of one update."""
        self._wait()
        started = time.perf_counter()
        for _ in range(self.loop.pace.micro_batches):
            self.loop.take(self.batch, Tensor.backward)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
