"""A verdict in words: whether QAT pays, and beside what.

QAT pays with an arm that is better than *every* way in which its baseline was stored: in the same
way as the arm, by each of the study's stores on the same grid, and by the budget solver in as many
bytes. Decided is what has a p below ``LEVEL`` after Holm's correction for all arms beside one way:
without it, one of 14 arms that do nothing is called better or worse in half of all studies. That an
arm has to be better than each of several ways needs no further correction; without a file in one of
them it is not decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qat.settings.schema import StoreSettings
from qat.study.findings import Contrast, Ledger, Treatment
from qat.study.law import BestShare
from qat.study.significance import LEVEL, Effect, holm

Effects = Mapping[str, Effect]  # by treatment
ALIKE = "the baseline stored in the same way"
AS_LARGE = "the solver's plan of the baseline in as many bytes"
PAYS, COSTS, OPEN = "pays with", "does not pay with", "is not decided for"
MOST_NAMED = 6  # arms, of one kind, in the headline


def ways_to_store(
    treatments: Sequence[Treatment], stores: Mapping[str, StoreSettings]
) -> dict[str, dict[str, Effect]]:
    """In words -> QAT as it stored itself less the baseline stored so, by treatment."""
    qat = [t for t in treatments if t.is_qat and t.store is None]
    ways = {ALIKE: _effects((t.name, t.alike) for t in qat)}
    for store in dict.fromkeys(store for t in qat for store in t.by_store):
        way = f"the baseline by {store} {where_stored(stores[store], 'on the same grid')}"
        ways[way] = _effects((t.name, t.by_store.get(store)) for t in qat)
    ways[AS_LARGE] = _effects((t.name, t.equal_bytes) for t in qat)
    return {way: effects for way, effects in ways.items() if effects}


def where_stored(store: StoreSettings, on_its_grid: str) -> str:
    """``on_its_grid``: said of a store that has no grid of its own and fills no limit."""
    if store.fill:
        return "filled to the same limit"
    return on_its_grid if store.grid is None else f"on {store.grid}"


def sentences(
    treatments: Sequence[Treatment],
    ways: Mapping[str, Effects],
    ledgers: Sequence[Ledger] = (),
    best_shares: Mapping[str, BestShare] | None = None,
    has_clock: bool = True,
) -> list[str]:
    """The headline, then what it rests on and what else was found. ``has_clock``: training was
    ended by a clock, that of the wall or a priced one, and not by a number of updates."""
    spent = "wallclock" if has_clock else "updates"
    beside = [(f"Beside {way}, QAT is", effects) for way, effects in ways.items()]
    further: list[tuple[str, Effects]] = []
    if has_clock:
        measured = {found.name: found.at_equal_steps for found in ledgers if found.is_measured}
        further.append(("At equal updates, as if QAT took no time, it is", measured))
    for store in dict.fromkeys(t.store for t in treatments if t.is_qat and t.store):
        both = _effects((t.arm, t.alike) for t in treatments if t.is_qat and t.store == store)
        further.append((f"With both stored by {store}, QAT is", both))
    changes = _effects((t.name, t.alike) for t in treatments if not t.is_qat)
    further.append(("Without QAT a change is", changes))
    effects_of_one = [effect for effects in ways.values() for effect in effects.values()]
    clauses = [*(beside if len(effects_of_one) != 1 else []), *further]
    said = [f"{start} {_sorted_out(effects)}." for start, effects in clauses if effects]
    said += [_best(grid, best) for grid, best in (best_shares or {}).items()]
    if any(len(effects) > 1 for _, effects in [*beside, *further]):
        said.append(
            f"Decided at {100 * LEVEL:g} % after Holm over the arms of a sentence, beside plain "
            "95 % intervals."
        )
    if ways:
        said.insert(0, _answer(ways, spent))
    return said or ["No arm has a baseline to compare with."]


def calls(effects: Effects) -> dict[str, str]:
    """``better``, ``worse``, or nothing of what is not decided."""
    adjusted = iter(holm([e.p_value for e in effects.values() if e.p_value is not None]))
    return {
        name: "" if effect.p_value is None or next(adjusted) >= LEVEL else _direction(effect)
        for name, effect in effects.items()
    }


def _direction(effect: Effect) -> str:
    return "worse" if effect.mean > 0.0 else "better"


def _answer(ways: Mapping[str, Effects], spent: str) -> str:
    called = [calls(effects) for effects in ways.values()]
    kinds: dict[str, list[str]] = {verb: [] for verb in (PAYS, COSTS, OPEN)}
    for name in dict.fromkeys(name for effects in ways.values() for name in effects):
        of_arm = {of_way.get(name, "") for of_way in called}
        kinds[PAYS if of_arm == {"better"} else COSTS if "worse" in of_arm else OPEN].append(name)
    said = [f"{verb} {_named(names)}" for verb, names in kinds.items() if names]
    seeds = _counted([e.num_seeds for effects in ways.values() for e in effects.values()])
    answer = f"At equal {spent} QAT {_listed(said)}"
    if len(ways) == 1 and len(called[0]) == 1:
        ((way, effects),) = ways.items()
        (effect,) = effects.values()
        return f"{answer}: {_direction(effect)} than {way} by {_size(effect)}{seeds}."
    if len(ways) == 1:
        return f"{answer}, beside {next(iter(ways))}{seeds}."
    return f"{answer}{seeds}. To pay is to be better than {_listed([*ways])}."


def _named(names: Sequence[str]) -> str:
    return _listed(names) if len(names) <= MOST_NAMED else f"{len(names)} arms"


def _counted(seeds: Sequence[int]) -> str:
    fewest, most = min(seeds), max(seeds)
    if most == 1:
        return " (one seed)"
    return f" ({most} seeds)" if fewest == most else f" ({fewest} to {most} seeds)"


def _best(grid: str, best: BestShare) -> str:
    known = "" if best.low is None else f" (95 % {_percent(best.low)} to {_percent(best.high)})"
    return (
        f"Of the shares tried on {grid} the best is {_percent(best.share)}{known} of the run, and "
        f"arXiv 2509.22935 predicts {_percent(best.predicted)} for "
        f"{best.tokens_per_parameter_byte:.3g} tokens per parameter byte."
    )


def _percent(share: float | None) -> str:
    assert share is not None
    return f"{100 * share:.3g} %"


def _effects(compared: Iterable[tuple[str, Contrast | None]]) -> dict[str, Effect]:
    verdicts = {name: contrast.verdict for name, contrast in compared if contrast is not None}
    return {
        name: Effect(v.mean, v.low, v.high, v.p_value, v.num_seeds) for name, v in verdicts.items()
    }


def _sorted_out(effects: Effects) -> str:
    """Which are better, which are worse, which are not decided."""
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for name, call in calls(effects).items():
        effect = effects[name]
        if effect.p_value is None:
            found = f"{_direction(effect)} by {_size(effect)} in its one seed"
            kinds[call].append(f"{name} ({found})")
        else:
            kinds[call].append(f"{name} (by {_size(effect)})" if call else name)
    words = {"better": "better with", "worse": "worse with", "": "not decided for"}
    said = [f"{words[call]} {_listed(names)}" for call, names in kinds.items() if names]
    return _listed(said) + _counted([effect.num_seeds for effect in effects.values()])


def _size(effect: Effect) -> str:
    """Of a difference, and its interval the same way round: above 0 more of it."""
    size = f"{abs(effect.mean):.4f} bits per byte"
    if effect.low is None or effect.high is None:
        return size
    sign = -1.0 if effect.mean < 0.0 else 1.0
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{size} [{low:.4f}, {high:.4f}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
