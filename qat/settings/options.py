"""Options of the groups in ``conf/`` and in the folders that users name, read without Hydra.

A grid is a ``qat`` option too: fake quantization on it, stored on it. A file ``qat/NAME.yaml`` says
something else (``none``), or more (``rd``).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.settings.schema import StudySettings, as_settings

CONF = Path(__file__).resolve().parents[2] / "conf"
folders = [CONF]  # where options are looked for; the first that has one wins, as in Hydra


def look_also_in(users_folders: Iterable[Path]) -> None:
    """Look there too, in this process, and let Hydra know the ``qat`` options of all grids."""
    folders[:] = [CONF, *users_folders]
    store = ConfigStore.instance()
    store.repo.pop("qat", None)
    for grid in files("grid").keys() - files("qat").keys():
        on_it = {"enabled": True, "grid": grid}
        node = {"defaults": [{"override /grid": grid}], "qat": on_it}
        store.store(grid, node, "qat", package="_global_")


def files(group: str) -> dict[str, Path]:
    """Option -> its file."""
    return {
        path.stem: path for folder in reversed(folders) for path in (folder / group).glob("*.yaml")
    }


def options(group: str) -> list[str]:
    return sorted(files(group) | (files("grid") if group == "qat" else {}))


def no_such_option(typed: str, group: str) -> UserError:
    return UserError(f"{typed}: no such option; choose from {', '.join(options(group))}")


def read_grid(option: str) -> Grid:
    """UserError if there is no such option."""
    if (file := files("grid").get(option)) is None:
        raise no_such_option(f"grid={option}", "grid")
    return as_settings(OmegaConf.merge(OmegaConf.structured(Grid), OmegaConf.load(file)), "grid.")


def read_study(experiment: str) -> StudySettings | None:
    """What experiment/NAME.yaml says of its study, None if it is not one.

    UserError if it says something else than a study can.
    """
    if (file := files("experiment").get(experiment)) is None:
        return None
    if (said := cast(DictConfig, OmegaConf.load(file)).get("study")) is None:
        return None
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudySettings), said)
        study = cast(StudySettings, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"{file.name}: study: {str(error).splitlines()[0]}") from None
    if study.baseline not in study.arms:
        raise UserError(f"{file.name}: study.baseline = {study.baseline}: not among study.arms")
    for grid in (study.grid, *(store.grid for store in study.stores.values())):
        if grid is not None:
            read_grid(grid)
    return study
