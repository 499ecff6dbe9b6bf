"""Options of the groups in ``conf/``, read without composing a program's settings."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.settings.schema import StudySettings, as_settings

CONF = Path(__file__).resolve().parents[2] / "conf"


def read_grid(option: str) -> Grid:
    """UserError if conf/grid/ has no such option."""
    path = CONF / "grid" / f"{option}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"grid={option}: no such option; choose from {known}")
    return as_settings(OmegaConf.merge(OmegaConf.structured(Grid), OmegaConf.load(path)), "grid.")


def read_study(experiment: str) -> StudySettings | None:
    """What conf/experiment/NAME.yaml says of its study, None if it is not one.

    UserError if it says something else than a study can.
    """
    path = CONF / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return None
    experiment_settings = OmegaConf.load(path)
    assert isinstance(experiment_settings, DictConfig)
    said = experiment_settings.get("study")
    if said is None:
        return None
    try:
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudySettings), said))
    except OmegaConfBaseException as error:
        raise UserError(f"{path.name}: study: {str(error).splitlines()[0]}") from None
    assert isinstance(study, StudySettings)
    if study.baseline not in study.arms:
        raise UserError(f"{path.name}: study.baseline = {study.baseline}: not among study.arms")
    for grid in (study.grid, *(store.grid for store in study.stores.values())):
        if grid is not None:
            read_grid(grid)
    return study
