"""The arms of a study: an experiment's ``study.arms``, made into options of the group ``arm``.

A sweep is a product of values, and arms are none: one changes the grid, the next the schedule. So
each arm is a set of overrides with a name, which Hydra composes as it does any option, in a sweep
(``-m experiment=bits``: all arms and seeds, seed by seed, so that what drifts meets all arms alike)
and in one run (``experiment=bits arm=int4 seed=3``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat.errors import UserError
from qat.settings.options import options, read_study

ARM = "arm"


def with_arms(arguments: list[str], groups: Collection[str], is_sweep: bool) -> list[str]:
    """Overrides for Hydra, which knows the arms from now on; in a sweep all arms and seeds that
    were not typed are added.

    A QAT option that no arm is named after is an arm too: ``arm=none,int3``. UserError for an
    unknown arm, or a setting that arms have already.
    """
    typed = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if "=" in a}
    experiment = typed.get("experiment", "")
    study = read_study(experiment)
    if study is None:
        if any(read_study(one) for one in experiment.split(",")):
            raise UserError(f"experiment={experiment}: give one study at a time")
        if ARM in typed:
            raise UserError(f"arm={typed[ARM]}: goes with an experiment that has arms")
        return arguments
    of_grid = next((key for key in typed if key.split(".")[0] == "grid"), None)
    if of_grid is not None and (study.grid or any(s.grid for s in study.stores.values())):
        raise UserError(
            f"{of_grid}={typed[of_grid]}: experiment={experiment} has grids of its own, which its "
            "baseline is stored on; give another experiment"
        )
    chosen = typed.get(ARM, ",".join(study.arms) if is_sweep else "")
    arms = study.arms | {qat: {"qat": qat} for qat in options("qat") if qat not in study.arms}
    for name in filter(None, chosen.split(",")):
        if name not in arms:
            raise UserError(f"arm={name}: choose from {', '.join(arms)}")
        if twice := sorted(set(arms[name]) & set(typed)):
            raise UserError(f"{twice[0]}={typed[twice[0]]}: arm={name} of the experiment sets it")
        node = _composed(arms[name], groups)
        ConfigStore.instance().store(name, node, ARM, package="_global_")
    if not is_sweep:
        if not chosen or "," in chosen:
            raise UserError(f"experiment={experiment}: give one arm=NAME, or -m to run all arms")
        return arguments
    seeds = typed.get("seed", ",".join(map(str, study.seeds)))
    rest = [a for a in arguments if a.partition("=")[0] not in (ARM, "seed")]
    if "sweep_name" not in typed:
        rest.append(f"sweep_name={experiment}")
    return [*rest, f"seed={seeds}", f"{ARM}={chosen}"]


def _composed(overrides: dict[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """An arm as Hydra's own options are written: a defaults list and values."""
    defaults = [{f"override /{key}": value} for key, value in overrides.items() if key in groups]
    node = OmegaConf.create({})
    for key, value in overrides.items():
        if key not in groups:
            OmegaConf.update(node, key, value)
    plain = OmegaConf.to_container(node)
    assert isinstance(plain, dict)
    return {"defaults": [*defaults, "_self_"] if plain else defaults, **plain}
