"""A setting is what it configures: the object's own checks speak, and name it as typed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pytest
from omegaconf import MISSING, OmegaConf

from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.settings.options import CONF, read_grid
from qat.settings.schema import PlanSettings, as_settings, require


@dataclass
class Small:
    """As TrainSettings has them."""

    grid: Grid = MISSING
    plan: PlanSettings = field(default_factory=PlanSettings)


def settings(**changes: object) -> Small:
    typed = {
        "grid": {"bits": 4},
        "plan": {"rules": {"*": "grid"}, "grids": {"int5": {"bits": 5}}},
    }
    return as_settings(OmegaConf.merge(OmegaConf.structured(Small), typed, changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"grid": {"bits": 9}}, "grid.bits = 9: give 2 to 8"),
        ({"grid": {"levels": "nf4"}}, "grid.bits = 4: nf4 has its own levels"),
        ({"plan": {"grids": {"int5": {"bits": 1}}}}, "plan.grids.int5.bits = 1: give 2 to 8"),
        (
            {"plan": {"grids": {"new": {"bits": 3, "percentile": 0}}}},
            "plan.grids.new.percentile = 0.0: give a fraction in (0, 1]",
        ),
    ],
)
def test_what_a_grid_refuses_is_named_as_typed(changes: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert str(caught.value) == line


def test_a_whole_number_is_named_as_people_type_it() -> None:
    for value, told in ((5.0, "5"), (1.5, "1.5"), (None, "null"), (float("inf"), "inf")):
        with pytest.raises(UserError, match=rf"^data\.val_fraction = {told}: give less$"):
            require(False, "data.val_fraction", value, "give less")


def test_settings_hold_grids_and_give_them_back() -> None:
    made = settings()
    assert made.grid == Grid(bits=4)
    assert made.plan.grids == {"int5": Grid(bits=5)}
    assert as_settings(OmegaConf.create(OmegaConf.to_yaml(made))) == asdict(made)


def test_every_option_is_a_grid() -> None:
    for path in (CONF / "grid").glob("*.yaml"):
        assert isinstance(read_grid(path.stem), Grid)
    assert read_grid("nf4") == Grid("nf4", group_size=64)
    with pytest.raises(UserError, match="grid=int99: no such option; choose from binary"):
        read_grid("int99")
