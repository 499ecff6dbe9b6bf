"""A study's comparison in W&B, read back from the offline run's files, and the view of its arms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
import wandb_workspaces.workspaces as ws
from matplotlib.figure import Figure

from qat.errors import UserError
from qat.report import wandb_view
from qat.report.wandb_comparison import log_comparison
from qat.settings.schema import LoggerSettings
from tests.made_up_study import comparison, made_up
from tests.offline_run import read_offline_run

PICTURES = ("curves", "pareto", "waterfall")
WANDB = LoggerSettings(name="wandb", tags=["night"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with its comparison logged twice."""
    folder = tmp_path_factory.mktemp("a study") / "night-1"
    folder.mkdir()
    for name in PICTURES:
        Figure(figsize=(1, 1)).savefig(folder / f"{name}.png")
    log_comparison(made_up(headline="Not known yet."), folder, WANDB)
    assert read_offline_run(folder).summary["headline"] == "Not known yet."
    (folder / "printed").write_text(log_comparison(made_up(), folder, WANDB))
    return folder


def test_the_comparison_replaces_itself_and_says_how_to_upload_it(study: Path) -> None:
    found = read_offline_run(study)  # one, though logged twice
    assert found.run.run_id.startswith("comparison-")
    assert (found.run.run_group, found.run.job_type) == ("night-1", "comparison")
    assert found.run.display_name == "night-1 comparison"
    assert list(found.run.tags) == ["night"]
    printed = (study / "printed").read_text()
    assert f"wandb sync '{found.folder}'" in printed
    assert f"python -m qat.report.wandb_view '{study / 'wandb_view.json'}'" in printed


def test_the_comparisons_summary_and_config(study: Path) -> None:
    found = read_offline_run(study)
    assert found.summary["headline"] == "It pays."
    assert found.config["commands"] == made_up().commands
    assert (found.config["baseline"], found.config["seeds"]) == ("none", [1, 2])
    t = comparison({1: -0.125, 2: -0.25}).verdict
    expected = {
        "val_bpb_artifact": 1.1875, "total_bytes": 55.0, "delta_bpb": -0.1875,
        "delta_bpb_low": t.low, "delta_bpb_high": t.high, "delta_bpb_p_value": t.p_value,
        "delta_bpb_equal_bytes": 0.5, "delta_bpb_equal_bytes_low": None,
        "delta_bpb_equal_bytes_high": None, "delta_bpb_equal_bytes_p_value": None,
    }  # fmt: skip
    assert {k: found.summary[f"int4/{k}"] for k in expected} == expected
    assert found.summary["none/val_bpb_artifact"] == 1.375
    assert found.summary["none/delta_bpb"] is None
    assert found.summary["dead/val_bpb_artifact"] is None


def test_the_comparisons_tables(study: Path) -> None:
    found = read_offline_run(study)
    base, int4, dead = found.table("treatments")
    assert (base["treatment"], base["store"], base["delta_bpb"]) == ("none", None, None)
    assert (int4["arm"], int4["store"], int4["grid"]) == ("int4", "as trained", "int4")
    for key in int4.keys() - {"treatment", "arm", "store", "grid"}:
        assert int4[key] == found.summary[f"int4/{key}"], key
    assert dead["total_bytes"] is None
    assert found.table("ledgers") == [
        {"treatment": "int4", "is_measured": True, "basis": "equal steps",
         "throughput_bpb": 0.01, "throughput_low": 0.005, "throughput_high": 0.015,
         "training_bpb": 0.02, "training_low": None, "training_high": None,
         "gap_bpb": -0.05, "gap_low": -0.06, "gap_high": -0.04,
         "total_bpb": 0.0, "total_low": None, "total_high": None,
         "at_equal_steps_bpb": -0.03, "at_equal_steps_low": -0.04, "at_equal_steps_high": -0.02}
    ]  # fmt: skip
    assert found.table("runs") == [
        {"run_name": "a", "qat": "int4", "val_bpb_artifact": 1.125, "data": '{"val": "0"}',
         "status": None, "note": None},
        {"run_name": "b", "qat": None, "val_bpb_artifact": None, "data": None,
         "status": "unfinished", "note": "it died"},
    ]  # fmt: skip


def test_the_comparisons_charts_and_pictures(study: Path) -> None:
    found = read_offline_run(study)
    points = found.table("charts/bytes_against_bpb_table")
    assert [(p["treatment"], p["total_bytes"], p["val_bpb_artifact"]) for p in points] == [
        ("none", 150.0, 1.375), ("int4", 55.0, 1.1875)
    ]  # fmt: skip
    lines = found.table("charts/bpb_over_seconds_table")
    drawn = [(point["lineKey"], point["step"], point["lineVal"]) for point in lines]
    assert sorted(drawn) == [
        ("int4", 1.0, 3.25), ("int4", 2.0, 2.25), ("int4", 3.0, 2.0), ("none", 1.0, 3.5),
        ("none", 2.0, 2.5)
    ]  # fmt: skip
    for name in PICTURES:
        (file,) = (found.folder / "files/media/images/pictures").glob(f"{name}_*.png")
        assert file.read_bytes() == (study / f"{name}.png").read_bytes()
        assert any(f"pictures/{name}.path" in row for row in found.history)


def test_a_study_with_nothing_to_draw(tmp_path: Path) -> None:
    empty = made_up(treatments=[], ledgers=[], curves=[], rows=[])
    log_comparison(empty, tmp_path, replace(WANDB, group="mine", project="other"))
    found = read_offline_run(tmp_path)
    assert (found.run.run_group, found.run.project) == ("mine", "other")
    assert found.summary["headline"] == "It pays."
    assert not (found.folder / "files/media").exists()


def panels_of(spec: dict) -> list[dict]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


@pytest.mark.parametrize("group", ["night-1", "it's", "a 'b' \"c\" and d", "back\\slash", "ä"])
def test_the_view_is_of_the_studys_training_runs_by_arm(group: str) -> None:
    view = wandb_view.comparison_view(made_up(), group, "somebody", "qat")
    model = view._to_model().model_dump(by_alias=True, exclude_none=True)
    assert (model["entity"], model["project"]) == ("somebody", "qat")
    (runset,) = model["spec"]["section"]["runSets"]
    wanted = {(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]}
    assert wanted == {("group", "=", group), ("jobType", "=", "train")}
    assert runset["grouping"] == [{"section": "config", "name": "arm.value"}]
    text, line, scatter, bar, comparer = panels_of(model["spec"])
    assert "It pays." in text["config"]["value"]
    assert (line["config"]["xAxis"], line["config"]["metrics"]) == (
        "elapsed_seconds", ["train_loss"]
    )  # fmt: skip
    assert scatter["config"]["xAxis"] == "summary:artifact_bytes"
    assert scatter["config"]["yAxis"] == "summary:val_bpb_artifact"
    assert bar["config"]["metrics"] == ["val_bpb_artifact"]
    assert line["config"]["groupBy"] == bar["config"]["groupBy"] == "arm.value"
    assert comparer["viewType"] == "Run Comparer"


class Online:
    """Stands for W&B's server: keeps what is saved, gives it an id."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saved: list[ws.internal.View] = []
        self.default_entity: str | None = "somebody"
        monkeypatch.setattr(ws.internal, "upsert_view2", self._upsert)
        monkeypatch.setattr(ws.interface, "get_app_url", lambda api: "https://wandb.example")
        monkeypatch.setattr("wandb.Api", lambda: self)

    def _upsert(self, view: ws.internal.View) -> dict:
        self.saved.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": view.id or "id-1"}}}


def test_the_view_is_saved_from_its_file_and_saved_again_under_its_id(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / wandb_view.FILE
    file.write_bytes((study / wandb_view.FILE).read_bytes())
    described = json.loads(file.read_text())
    online = Online(monkeypatch)
    url = wandb_view.save_view(file)
    (first,) = online.saved
    assert url.startswith("https://wandb.example/somebody/qat?nw=")
    assert first.spec.model_dump(by_alias=True, exclude_none=True) == described["spec"]
    assert (first.id, first.entity) == ("", "somebody")
    wandb_view.describe_view(wandb_view.comparison_view(made_up(), "g", "", "qat"), file)
    assert wandb_view.save_view(file) == url
    again = online.saved[-1]
    assert (again.id, again.name) == ("id-1", first.name)


def test_the_command_that_saves_the_view(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / wandb_view.FILE
    file.write_bytes((study / wandb_view.FILE).read_bytes())
    online = Online(monkeypatch)
    assert wandb_view.main([str(file), "a-team"]) == 0
    assert "https://wandb.example/a-team/qat?nw=" in capsys.readouterr().out
    assert online.saved[0].entity == "a-team"
    online.default_entity = None
    for arguments, said in (
        ([], "usage: python -m qat.report.wandb_view"),
        ([str(tmp_path / "no")], "no: no view of a study ("),
        ([str(file)], "no default entity; name one"),
    ):
        assert wandb_view.main(arguments) == 2
        assert said in capsys.readouterr().err


def test_online_the_view_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the way to the server, which stays offline."""
    online, init, asked = Online(monkeypatch), wandb.init, []

    def offline_init(**given: object) -> wandb.Run:
        asked.append(given["mode"])
        return init(**given | {"mode": "offline"})

    monkeypatch.setattr(wandb, "init", offline_init)
    printed = log_comparison(made_up(), tmp_path, replace(WANDB, offline=False))
    assert asked == ["online"]
    assert len(online.saved) == 1
    assert "arms compared: https://wandb.example/somebody/qat?nw=" in printed
    assert json.loads((tmp_path / wandb_view.FILE).read_text())["id"] == "id-1"


def test_no_login_and_no_view_are_one_line(nobody_logged_in, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"W&B refused \(No API key configured.*\); run"):
        log_comparison(made_up(), tmp_path, replace(WANDB, offline=False))
    file = tmp_path / wandb_view.FILE
    for text in ("{", '{"project": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"wandb_view.json: no view of a study \("):
            log_comparison(made_up(), tmp_path, WANDB)
