"""Which runs of a study share their first updates, and that sharing changes nothing."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hydra_plugins.qat_sweeper import batches_of
from qat.errors import UserError
from qat.quantize.gradients import rule_kinds
from qat.quantize.grid import Grid
from qat.runs.fork import Course
from qat.runs.result import Result
from qat.runs.run_folder import kept_steps, read_config
from qat.settings.schema import (
    AveragingSettings,
    DistillSettings,
    QatSettings,
    TrainSettings,
    from_yaml,
)
from qat.study import prices
from qat.study.find_out import find_out
from qat.study.forks import Fork, find_forks, kept_by
from qat.study.prices import Price, Prices, given, median_interval, what_costs
from qat.study.study import Study, studies_in
from tests.conftest import Done
from tests.runs.test_fork import same_run

RUNS = Path("logs/runs")


@pytest.fixture(scope="module")
def settings(finished: Path) -> TrainSettings:
    """Of a run of 1,000 updates, its rate falling over the last 250."""
    s = from_yaml(read_config(finished)[0], "resume")
    schedule = replace(s.schedule, warmdown_steps=None, warmdown_fraction=0.25)
    none = QatSettings(enabled=False)
    return replace(s, max_steps=1000, schedule=schedule, qat=none, seed=1, fork=type(s.fork)())


def qat(s: TrainSettings, bits: int, start: float, **more: object) -> TrainSettings:
    q = QatSettings(enabled=True, start_fraction=start)
    return replace(s, grid=Grid(bits=bits), qat=q, **more)  # type: ignore[arg-type]


def test_arms_leave_the_run_that_they_share_most_with(settings: TrainSettings) -> None:
    ema = AveragingSettings("ema", start_fraction=0.9)
    forks = find_forks({
        "none_s1": settings,
        "int4_s1": qat(settings, 4, 0.5),
        "int4_late_s1": qat(settings, 4, 0.85),
        "int4_ema_s1": qat(settings, 4, 0.5, averaging=ema),
        "ema_s1": replace(settings, averaging=ema),
        "from_0_s1": qat(settings, 4, 0.0),
        "none_s2": replace(settings, seed=2),
        "int4_s2": qat(replace(settings, seed=2), 4, 0.5),
        "slow_s1": replace(settings, optimizer=replace(settings.optimizer, matrix_lr=0.01)),
        "clock_s1": replace(settings, budget_seconds=30.0),
    })  # fmt: skip
    assert forks == {
        "int4_s1": Fork("none_s1", 500),
        "int4_late_s1": Fork("none_s1", 850),
        "int4_ema_s1": Fork("int4_s1", 899),  # the average takes the weights after update 900
        "ema_s1": Fork("none_s1", 899),
        "int4_s2": Fork("none_s2", 500),
    }
    assert kept_by("none_s1", forks) == [500, 850, 899]


def test_a_fork_keeps_nothing_from_before_it(settings: TrainSettings) -> None:
    """The trunk is finished and kept its state after update 500 alone."""
    runs = {
        "none_s1": settings,
        "early_s1": qat(settings, 4, 0.25),
        "early_int3_s1": qat(settings, 3, 0.25),
        "late_s1": qat(settings, 4, 0.75),
        "late_int3_s1": qat(settings, 3, 0.75),
    }
    kept = {"none_s1": 500}
    forks = find_forks(runs, lambda run, step: kept.get(run, step) * (step >= kept.get(run, 0)))
    assert forks == {
        "early_int3_s1": Fork("early_s1", 250),
        "late_s1": Fork("none_s1", 500),
        "late_int3_s1": Fork("late_s1", 750),
    }


def test_trunks_run_before_what_goes_on_from_them() -> None:
    after = [None, 0, 3, None, 2]  # jobs 0 to 4; the last waits for one that waits
    assert batches_of(after, in_turn=False) == [[0, 3], [1, 2], [4]]
    assert batches_of(after, in_turn=True) == [[0, 1, 3, 2, 4]]


def test_another_warmdown_is_left_where_the_rate_falls(settings: TrainSettings) -> None:
    long = replace(settings, schedule=replace(settings.schedule, warmdown_fraction=0.5))
    longer = replace(settings, max_steps=2000)
    forks = find_forks({"none_s1": settings, "long_s1": long, "longer_s1": longer})
    assert forks == {"long_s1": Fork("none_s1", 501), "longer_s1": Fork("none_s1", 751)}


def test_a_price_changes_nothing_before_the_switch(settings: TrainSettings) -> None:
    dear = qat(settings, 4, 0.5)
    dear = replace(dear, schedule=replace(dear.schedule, qat_update_price=1.25))
    assert find_forks({"none_s1": settings, "int4_s1": dear})["int4_s1"].step == 500


def test_what_trains_to_other_bytes_is_left_at_the_switch(settings: TrainSettings) -> None:
    """Before it only the sensitivities are learned, which no limit changes."""
    rd = qat(settings, 8, 0.5, limit_bytes=475_000)
    rd = replace(rd, qat=replace(rd.qat, to_bytes=True))
    forks = find_forks({
        "rd_1_s1": rd,
        "rd_2_s1": replace(rd, limit_bytes=800_000),
        "other_coder_s1": replace(rd, artifact=replace(rd.artifact, coder="zlib")),
    })  # fmt: skip
    assert forks == {"rd_2_s1": Fork("rd_1_s1", 500), "other_coder_s1": Fork("rd_1_s1", 500)}
    assert Course.of(rd, code_bytes=1).shared(Course.of(rd, code_bytes=2)) == 500
    plain = qat(settings, 4, 0.5, limit_bytes=475_000)
    assert find_forks({"one": plain, "two": replace(plain, limit_bytes=800_000)})["two"].step == 999


@pytest.mark.parametrize("gradient", sorted(rule_kinds()))
def test_only_what_anneals_is_another_in_a_longer_run(
    gradient: str, settings: TrainSettings
) -> None:
    """Update 600 is half-way from the switch in one, and earlier in the other."""
    q = QatSettings(enabled=True, start_step=500, gradient=gradient)
    short = replace(settings, grid=Grid(bits=4), qat=q)
    dear = replace(short.schedule, qat_update_price=1.25)
    forks = find_forks({
        "short": short,
        "long": replace(short, max_steps=2000),
        "dear": replace(short, schedule=dear),
    })  # fmt: skip
    anneals = gradient in ("cage", "dampen", "freeze", "parq", "soft_round")
    assert {run: fork.step for run, fork in forks.items()} == {
        "long": 500 if anneals else 751,
        "dear": 501 if anneals else 701,  # its rate falls sooner
    }


def test_training_to_bytes_encodes_half_way(settings: TrainSettings) -> None:
    rd = replace(settings, qat=QatSettings(enabled=True, start_step=500, to_bytes=True))
    longer = replace(rd, max_steps=2000)
    assert find_forks({"rd_s1": rd, "longer_s1": longer})["longer_s1"].step == 500


def test_rules_of_another_order_are_another_plan(settings: TrainSettings) -> None:
    plan = settings.plan
    turned = replace(plan, rules=dict(reversed(plan.rules.items())))
    runs = {"one_s1": qat(settings, 4, 0.5), "other_s1": qat(settings, 4, 0.5, plan=turned)}
    assert find_forks(runs) == {"other_s1": Fork("one_s1", 500)}


def test_nothing_goes_on_from_what_was_not_kept(settings: TrainSettings) -> None:
    runs = {"none_s1": settings, "int4_s1": qat(settings, 4, 0.5)}
    assert not find_forks(runs, lambda name, step: 0 if name == "none_s1" else step)


def test_where_the_trunk_kept_nothing_the_nearest_it_kept_will_do(settings: TrainSettings) -> None:
    """It ended before a study asked for later starts."""
    runs = {
        "none_s1": settings, "int6_s1": qat(settings, 6, 0.8), "int4_s1": qat(settings, 4, 0.8)
    }  # fmt: skip
    forks = find_forks(runs, lambda name, step: min(step, 500) if name == "none_s1" else step)
    assert forks == {"int6_s1": Fork("none_s1", 500), "int4_s1": Fork("int6_s1", 800)}


QUIET = Console(quiet=True)
ASKED = ("-m", "experiment=start", "arm=none,int6,int4", "seed=1,2", "sweep_name=s")


@pytest.fixture
def study(train: Callable[..., Done]) -> Callable[..., Done]:
    return lambda *more: train(*ASKED, *more)


@pytest.mark.slow
def test_a_study_makes_shared_updates_once_and_the_bits_are_those_of_whole_runs(
    train: Callable[..., Done], study: Callable[..., Done]
) -> None:
    asked = ("seed=2", "arm=none,int4")
    done = study(*asked)
    assert done.code == 0, done.err
    rows = {arm: Result.read(RUNS / "s" / f"{arm}_s2") for arm in ("none", "int4")}
    forked = {arm: (row.forked_from, row.forked_steps) for arm, row in rows.items() if row}
    assert forked == {"none": (None, None), "int4": ("none_s2", 6)}
    assert kept_steps(RUNS / "s" / "none_s2") == [6]
    whole = ("experiment=start", "arm=int4", "seed=2", "run_name=whole")
    assert train(*whole).code == 0
    assert same_run(RUNS / "whole", RUNS / "s" / "int4_s2")
    before = (RUNS / "s" / "int4_s2" / "train.log").read_bytes()
    assert study(*asked).code == 0  # again: nothing is run, nothing is refused
    assert (RUNS / "s" / "int4_s2" / "train.log").read_bytes() == before


@pytest.mark.slow
def test_a_trunk_that_kept_nothing_costs_only_time(study: Callable[..., Done]) -> None:
    assert study("seed=1", "arm=none").code == 0  # alone it has nobody to keep anything for
    assert not kept_steps(RUNS / "s" / "none_s1")
    done = study("seed=1", "arm=none,int4")
    assert done.code == 0, done.err
    row = Result.read(RUNS / "s" / "int4_s1")
    assert row is not None
    assert (row.status, row.forked_from) == ("finished", None)


@pytest.mark.slow
def test_a_priced_study_counts_what_updates_cost(
    study: Callable[..., Done], train: Callable[..., Done]
) -> None:
    priced = ("study.clock=priced", "study.prices={int6: 1.5, int4: [1.0, 2.0]}", "seed=1")
    done = study(*priced, "ledger=full")
    assert done.code == 0, done.err
    steps = {}
    for arm in ("none", "int6", "int4"):
        row = Result.read(RUNS / "s" / f"{arm}_s1")
        assert row is not None
        steps[arm] = row.steps, row.qat_steps
    prices_of_one = ("study.clock=priced", "study.prices={int4: [1.0, 2.0]}", "seed=1")
    alone = train("experiment=start", "arm=int4", *prices_of_one, "run_name=alone")
    assert alone.code == 0, alone.err
    assert same_run(RUNS / "alone", RUNS / "s" / "int4_s1")
    alone = train("experiment=start", "arm=int4", "study.clock=priced")
    assert alone.err == (
        "error: study.clock = priced: one run cannot time its price; give study.prices={int4: "
        "PRICE}, or -m\n"
    )
    # 12 updates, 6 of them before the switch: the other 6 buy 4 at 1.5, 3 at 2.
    assert steps == {"none": (12, 0), "int6": (10, 4), "int4": (9, 3)}
    equal = {path.parent.name: Result.read(path) for path in (RUNS / "s").glob("*/equal_steps")}
    assert {arm: (row.steps, row.qat_steps) for arm, row in equal.items() if row} == {
        "int6_s1": (10, 0), "int4_s1": (9, 0),
    }  # fmt: skip
    of_int6 = sorted((RUNS / "s" / "none_s1" / "exports").glob("int6*.json"))
    assert [file.name.partition("_")[0] for file in of_int6] == ["int6+gptq", "int6"]
    next_run = (RUNS / "s" / "int4_s1" / "config.yaml").stat().st_mtime_ns
    assert all(file.stat().st_mtime_ns < next_run for file in of_int6)  # not left to the report
    file = RUNS / "s" / "start.study.json"
    findings = find_out(RUNS / "s", Study.read(file), QUIET)
    assert findings.headline.startswith("At equal wallclock QAT ")
    at_equal_steps = "At equal updates, as if QAT took no time, it is "
    assert sum(said.startswith(at_equal_steps) for said in findings.details) == 1
    assert all(ledger.is_measured for ledger in findings.ledgers)
    report = (RUNS / "s" / "start" / "REPORT.md").read_text()
    assert "- Clock: what 12 updates of none take, at the prices of each arm's\n" in report
    said = Study.read(file).settings
    assert (said.clock, said.prices) == ("priced", {"int6": 1.5, "int4": [1.0, 2.0]})
    file.rename(file.with_suffix(".kept"))
    (of_runs,) = studies_in(RUNS / "s")  # as if they had been put there one by one
    assert (of_runs.settings, of_runs.arms) == (said, ["int4", "int6", "none"])
    file.with_suffix(".kept").rename(file)
    done = study("study.clock=priced", "study.prices={int6: 1.4, int4: 2}", "seed=1")
    assert done.code == 2
    assert "sweep_name=s: int6_s1 was run there with schedule.qat_update_price = 1.5" in done.err


def test_one_price_of_every_arm_with_qat(settings: TrainSettings) -> None:
    arms = {"none": settings, "int6": qat(settings, 6, 0.5), "int4": qat(settings, 4, 0.5)}
    prices = given(arms, {"qat": 1.5, "int4": [1.0, 2.0]}).arms
    assert {arm: price.after for arm, price in prices.items()} == {
        "none": 1.0, "int6": 1.5, "int4": 2.0,
    }  # fmt: skip


def test_what_takes_longer_has_a_price_of_its_own(settings: TrainSettings) -> None:
    plain = qat(settings, 4, 0.5)
    noise = replace(plain, qat=replace(plain.qat, gradient="noise"))
    taught = replace(plain, qat=replace(plain.qat, distill=DistillSettings(weight=1.0)))
    both = replace(noise, qat=replace(noise.qat, distill=DistillSettings(weight=1.0)))
    learned = replace(plain, grid=replace(plain.grid, scale_rule="learned"))
    rd = replace(learned, qat=replace(learned.qat, to_bytes=True))
    arms = {"a": plain, "b": noise, "c": taught, "d": learned, "e": rd, "f": both}
    asked = {"qat": 1.1, "noise": 1.2, "distill": 1.3, "learned": 1.4, "to_bytes": 1.5, "f": 1.6}
    found = [price.after for price in given(arms, asked).arms.values()]
    assert found == [1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
    for missing, arm in (("noise", "b"), ("distill", "c"), ("learned", "d"), ("f", "f")):
        few = {name: price for name, price in asked.items() if name != missing}
        with pytest.raises(UserError, match=f"arm {arm} trains with QAT and has no price"):
            given(arms, few)
    with pytest.raises(UserError, match=r"study\.prices\.nosie: no such arm"):
        given(arms, asked | {"nosie": 1.2})


def test_an_arm_with_qat_is_not_free(settings: TrainSettings) -> None:
    arms = {"none": settings, "int6": qat(settings, 6, 0.5), "int4": qat(settings, 4, 0.5)}
    with pytest.raises(
        UserError, match=r"study\.prices: arm int4 trains with QAT and has no price"
    ):
        given(arms, {"int6": 1.5})
    assert given(arms, {"int6": 1.5, "int4": 1.0}).arms["int4"] == Price()


def test_only_what_costs_something_is_timed(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, bool]] = []

    def race(base: object, others: dict[tuple[str, bool], object], console: Console) -> object:
        timed.extend(others)
        return prices._Ratios(0.1, {key: [1.2] * 20 for key in others})

    monkeypatch.setattr(prices, "_race", race)
    monkeypatch.setattr(prices, "_Updates", lambda s, is_on: s)
    long = replace(settings, schedule=replace(settings.schedule, warmdown_steps=9))
    averaged = replace(settings, averaging=AveragingSettings(kind="ema"))
    arms = {"none": settings, "long": long, "ema": averaged, "int4": qat(settings, 4, 0.5)}
    found = prices.measure(arms, "none", Console(quiet=True)).arms
    assert timed == [("ema", False), ("int4", True)]
    assert [(p.before, p.after) for p in found.values()] == [(1, 1), (1, 1), (1.2, 1.2), (1, 1.2)]


@pytest.mark.slow
def test_a_study_whose_prices_are_measured(
    study: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices, "SECONDS_PER_ARM", 0.2)
    asked = ("study.clock=priced", "seed=1", "arm=none,int4")
    done = study(*asked, "max_steps=12")
    assert done.code == 0, done.err
    assert "an update of int4:" in done.err
    file = RUNS / "s" / "start.prices.json"
    said = json.loads(file.read_text())
    price = said["arms"]["int4"]
    assert said["update_seconds"] > 0
    assert price["low"] <= price["after"] <= price["high"]
    assert (price["before"], said["arms"]["none"]["after"]) == (1.0, 1.0)
    row = Result.read(RUNS / "s" / "int4_s1")
    assert row is not None
    assert row.settings["schedule"]["qat_update_price"] == price["after"]
    assert study(*asked, "max_steps=12").code == 0  # with the prices that are there
    done = study(*asked, "max_steps=12", "model.dim=32")
    assert done.code == 2
    assert "start.prices.json: updates of int4 were timed with model.dim = 64, not 32" in done.err
    file.write_text(json.dumps(said | {"hardware": "an abacus"}))
    done = study(*asked, "max_steps=12")
    assert done.code == 2
    assert "start.prices.json: updates were timed on another machine (an abacus)" in done.err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"batch_tokens": 512}, "batch_tokens = 256, not 512"),
        ({"precision": "bf16"}, "precision = fp32, not bf16"),
        ({"grid": Grid(bits=3)}, "grid.bits = 4, not 3"),
        ({"qat": QatSettings(enabled=True, gradient="freeze")}, "qat.gradient = identity, not fre"),
        ({"qat": QatSettings(enabled=True, start_step=9)}, None),  # what its updates cost is equal
        ({"max_steps": 2000, "seed": 2, "limit_bytes": 9}, None),
    ],
)
def test_prices_are_of_updates_that_cost_the_same(
    change: dict[str, Any], what: str | None, tmp_path: Path, settings: TrainSettings
) -> None:
    arms = {"none": settings, "int4": qat(settings, 4, 0.5)}
    with_what = {arm: what_costs(s) for arm, s in arms.items()}
    made = replace(given(arms, {"qat": 1.1}), update_seconds=0.1, timed_with=with_what)
    made.write(tmp_path / "p.json")
    known = Prices.read(tmp_path / "p.json")
    known.check(tmp_path / "p.json", arms)
    changed = arms | {"int4": replace(arms["int4"], **change)}
    if what is None:
        known.check(tmp_path / "p.json", changed)
        return
    with pytest.raises(UserError, match=f"updates of int4 were timed with {what}"):
        known.check(tmp_path / "p.json", changed)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("study.prices={int4: 2}",), "study.prices: only with study.clock=priced"),
        (("study.clock=priced", "study.prices={int33: 2}"), "study.prices.int33: no such arm"),
        (("study.clock=priced", "study.prices={int4: 0}"), "study.prices.int4 = 0: give a price"),
        (("study.clock=priced", "study.prices={int4: [1]}"), "give a price, or [before, after]"),
        (("study.clock=priced", "study.prices={qat: 2}", "budget_seconds=9", "max_steps=null"),
         "budget_seconds = 9: study.prices say nothing of seconds"),
        (("study.clock=priced", "arm=int4"), "prices are in updates of none; add that arm"),
        (("study.clock=sundial",), "study.clock = sundial: choose from wall, priced"),
        (("schedule.update_price=2",), "schedule.update_price: arm none has its price from"),
        (("budget_seconds=9", "schedule.qat_update_price=2"), "a priced run has no clock"),
    ],
)  # fmt: skip
def test_mistakes(asked: tuple[str, ...], said: str, study: Callable[..., Done]) -> None:
    done = study("seed=1", *asked)
    assert done.code == 2
    assert said in done.err
    assert not (RUNS / "s").exists()


def test_the_interval_of_a_median_holds_it() -> None:
    values = [float(v) for v in range(101)]
    middle, low, high = median_interval(values)
    assert middle == 50.0
    assert (low, high) == (40.0, 60.0)  # 50.5 -+ 1.96 * sqrt(101) / 2, rounded outwards


@pytest.mark.parametrize("count", [20, 21, 22, 50, 97, 300])
def test_it_is_the_narrowest_that_holds_it_in_95_percent(count: int) -> None:
    _, low, high = median_interval([float(v) for v in range(count)])
    below = int(low)
    assert int(high) == count - 1 - below

    def share_held(below: int) -> float:
        return 1 - 2 * sum(math.comb(count, k) for k in range(below + 1)) / 2**count

    assert share_held(below) >= 0.95 > share_held(below + 1)


class MadeUpUpdates:
    """Take times around their mean, which are not waited for."""

    def __init__(self, chooser: random.Random, seconds: float) -> None:
        self.chooser, self.seconds = chooser, seconds

    def take(self) -> float:
        return self.seconds * math.exp(self.chooser.gauss(0.0, 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_interval_of_a_race_holds_the_price(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 95 of 100 races, whose pairs of updates are no more than what is compared."""
    monkeypatch.setattr(prices, "SECONDS_PER_ARM", 16.0)
    chooser = random.Random(1)
    base, arm = MadeUpUpdates(chooser, 0.1), MadeUpUpdates(chooser, 0.11)
    price = statistics.median(
        arm.take() / statistics.mean([base.take(), base.take()]) for _ in range(200_000)
    )
    held = []
    for _ in range(800):
        timed = {(f"arm{number}", True): arm for number in range(count)}
        ratios = prices._race(base, timed, Console(quiet=True))  # type: ignore[arg-type]
        for pairs in ratios.times.values():
            _, low, high = median_interval(pairs)
            held.append(low <= price <= high)
    assert statistics.mean(held) == pytest.approx(0.955, abs=0.02)


def test_prices_come_back(tmp_path: Path, settings: TrainSettings) -> None:
    made = given({"none": settings, "int4": settings}, {"int4": 1.25})
    made.write(tmp_path / "p.json")
    assert Prices.read(tmp_path / "p.json") == made
    assert made.arms["int4"] == Price(1.0, 1.25)
    (tmp_path / "p.json").write_text('{"arms": {"int4": {}}}')
    with pytest.raises(UserError, match="not prices of this version"):
        Prices.read(tmp_path / "p.json")


@pytest.mark.slow
def test_the_best_share_of_a_study_of_starts(train: Callable[..., Done]) -> None:
    done = train("-m", "experiment=start", "arm=none,int4_25,int4,int4_75", "seed=1,2",
                 "sweep_name=s", "max_steps=12")  # fmt: skip
    assert done.code == 0, done.err
    assert "Of the shares tried on int4 the best is" in done.out.replace("\n", " ")


@pytest.mark.slow
def test_a_priced_clock_agrees_with_that_of_the_wall(train: Callable[..., Done]) -> None:
    """The same arms under two clocks: what they say of QAT overlaps."""
    asked = ("-m", "experiment=pair", "arm=none,int4", "seed=1,2,3", "budget_seconds=2",
             "max_steps=null", "schedule.warmdown_steps=10")  # fmt: skip
    verdicts = {}
    for clock in ("wall", "priced"):
        done = train(*asked, f"sweep_name={clock}", f"study.clock={clock}")
        assert done.code == 0, done.err
        folder = RUNS / clock
        findings = find_out(folder, Study.read(folder / "pair.study.json"), QUIET)
        (int4,) = (t for t in findings.treatments if t.name == "int4")
        assert int4.alike is not None
        verdicts[clock] = int4.alike.verdict
    wall, priced = verdicts["wall"], verdicts["priced"]
    assert wall.low is not None
    assert priced.low is not None
    assert max(wall.low, priced.low) <= min(wall.high or 0.0, priced.high or 0.0)
    rows = [Result.read(RUNS / "priced" / f"{arm}_s1") for arm in ("none", "int4")]
    assert all(row is not None and row.settings["budget_seconds"] is None for row in rows)
