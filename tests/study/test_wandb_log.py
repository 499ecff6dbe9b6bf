"""What W&B is given, read back from the offline runs' own files, without network."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import wandb
import wandb_workspaces.workspaces as ws
from matplotlib.figure import Figure

from qat.errors import UserError
from qat.settings.schema import LoggerSettings
from qat.study import wandb_view
from qat.study.findings import Comparison, Curve, Findings, Interval, Ledger, Treatment
from qat.study.significance import verdict
from qat.study.wandb_comparison import log_comparison
from tests.conftest import _call, result_of
from tests.study.offline_run import OfflineRun, read_offline_run

PICTURES = ("curves", "pareto", "waterfall")
WANDB = LoggerSettings(name="wandb", tags=["night"])
NO_INTERVAL = Interval(0.0, None, None)


@pytest.fixture(scope="module", autouse=True)
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B keeps copies of tables in the user's home otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("WANDB_SILENT", "true")
        yield


@pytest.fixture(scope="module")
def sweep(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two arms, logged."""
    parent, before = tmp_path_factory.mktemp("logged"), os.getcwd()
    os.chdir(parent)
    try:
        asked = ["qat=none,int6", "seed=7", "max_steps=12", "sweep_name=pair", "logger=wandb",
                 "logger.tags=[night]", "logger.every_steps=5"]  # fmt: skip
        done = _call("train.py", ["-m", *tiny, *asked])
    finally:
        os.chdir(before)
    assert done.code == 0, done.err
    return parent / "logs" / "runs" / "pair"


def logged(run: Path) -> OfflineRun:
    (folder,) = (run / "wandb").glob("offline-run-*")
    return read_offline_run(folder)


@pytest.fixture(scope="module")
def runs(sweep: Path) -> dict[str, tuple[Path, OfflineRun]]:
    """By arm: the run's folder and what W&B keeps of it."""
    folders = [path.parent for path in sweep.glob("*/result.json")]
    return {result_of(folder)["qat"]: (folder, logged(folder)) for folder in folders}


@pytest.mark.parametrize("arm", ["none", "int6"])
def test_a_runs_group_tags_config_and_summary(runs, arm: str) -> None:
    folder, found = runs[arm]
    row = result_of(folder)
    assert (found.run.project, found.run.display_name) == ("qat", folder.name)
    assert (found.run.run_group, found.run.job_type) == ("pair", "train")
    assert sorted(found.run.tags) == sorted({arm, "seed7", row["grid"], "night"})
    assert found.config["arm"] == arm
    for key in ("seed", "max_steps", "model", "grid", "optimizer", "schedule"):
        assert found.config[key] == row["settings"][key], key
    assert row["val_bpb_artifact"] is not None
    for key in row.keys() - {"settings"}:
        assert found.summary[key] == row[key], key
    assert found.exit_code == 0


def test_history_is_metrics_csv(runs) -> None:
    for folder, found in runs.values():
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert len(rows) == 12
        history = [row for row in found.history if "train_loss" in row]
        assert [row["trainer/global_step"] for row in history] == [int(r["step"]) for r in rows]
        for key in ("train_loss", "elapsed_seconds", "rate", "qat_on"):
            assert [row[key] for row in history] == [float(r[key]) for r in rows], key


def comparison(by_seed: dict[int, float]) -> Comparison:
    return Comparison("the same", by_seed, verdict(list(by_seed.values()), [0.0] * len(by_seed), 3))


def made_up(**changed: object) -> Findings:
    """Three treatments, one of them without any file, and a row of each kind."""
    base = Treatment("none", "none", None, "int8", False, {1: 1.25, 2: 1.5}, {1: 100, 2: 200}, {},
                     None, None)  # fmt: skip
    int4 = replace(base, name="int4", arm="int4", grid="int4", is_qat=True, store="as trained",
                   val_bpb={1: 1.125, 2: 1.25}, total_bytes={1: 50, 2: 60},
                   alike=comparison({1: -0.125, 2: -0.25}),
                   equal_bytes=comparison({1: 0.5}))  # fmt: skip
    dead = replace(base, name="dead", val_bpb={}, total_bytes={}, missing_seeds={1: "diverged"})
    ledger = Ledger("int4", True, Interval(0.01, 0.005, 0.015), Interval(0.02, None, None),
                    Interval(-0.05, -0.06, -0.04), NO_INTERVAL, "equal steps")  # fmt: skip
    rows = [
        {"run_name": "a", "qat": "int4", "val_bpb_artifact": 1.125, "data": {"val": "0"},
         "settings": {"secret": 1}},
        {"run_name": "b", "status": "unfinished", "note": "it died"},
    ]  # fmt: skip
    curves = [Curve("none", [1.0, 2.0], [3.5, 2.5], None, 1.2, 1.25),
              Curve("int4", [1.0, 2.0, 3.0], [3.25, 2.25, 2.0], 2.0, None, None)]  # fmt: skip
    findings = Findings(
        "night-1", "does it pay?", "It pays.", "none", [1, 2], 60.0, ["2 cores"], ["abc"],
        # Longer than a block of the file, so that a message in several fragments is read too.
        ["python train.py " + "a=1 " * 20_000],
        [base, int4, dead], [ledger], curves, rows,
    )  # fmt: skip
    return replace(findings, **changed)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with its comparison logged twice."""
    folder = tmp_path_factory.mktemp("a study") / "night-1"
    folder.mkdir()
    for name in PICTURES:
        Figure(figsize=(1, 1)).savefig(folder / f"{name}.png")
    log_comparison(made_up(headline="Not known yet."), folder, WANDB)
    (folder / "printed").write_text(log_comparison(made_up(), folder, WANDB))
    return folder


def test_the_comparison_replaces_itself_and_says_how_to_upload_it(study: Path) -> None:
    found = logged(study)  # one, though logged twice
    assert found.run.run_id.startswith("comparison-")
    assert (found.run.run_group, found.run.job_type) == ("night-1", "comparison")
    assert found.run.display_name == "night-1 comparison"
    assert list(found.run.tags) == ["night"]
    printed = (study / "printed").read_text()
    assert f"wandb sync '{found.folder}'" in printed
    assert f"python -m qat.study.wandb_view '{study / 'wandb_view.json'}'" in printed


def test_the_comparisons_summary_and_config(study: Path) -> None:
    found = logged(study)
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
    found = logged(study)
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
         "total_bpb": 0.0, "total_low": None, "total_high": None}
    ]  # fmt: skip
    assert found.table("runs") == [
        {"run_name": "a", "qat": "int4", "val_bpb_artifact": 1.125, "data": '{"val": "0"}',
         "status": None, "note": None},
        {"run_name": "b", "qat": None, "val_bpb_artifact": None, "data": None,
         "status": "unfinished", "note": "it died"},
    ]  # fmt: skip


def test_the_comparisons_charts_and_pictures(study: Path) -> None:
    found = logged(study)
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
    found = logged(tmp_path)
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


def test_the_view_names_only_what_runs_log(runs) -> None:
    _, found = runs["int6"]
    model = wandb_view.comparison_view(made_up(), "g", "", "qat")._to_model().model_dump()
    (runset,) = model["spec"]["section"]["run_sets"]
    for column in runset["run_feed"]["column_order"][1:]:
        kind, key = column.split(":")
        assert key in (found.config if kind == "config" else found.summary), column
    assert {"train_loss", "elapsed_seconds"} <= found.history[-1].keys()


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
        ([], "usage: python -m qat.study.wandb_view"),
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


def test_no_login_and_no_view_are_one_line(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "NETRC"):  # where a developer's own login may be
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "offline")  # the setting decides
    refused = r"W&B refused \(No API key configured.*\); run `wandb login`"
    with pytest.raises(UserError, match=refused):
        log_comparison(made_up(), tmp_path, replace(WANDB, offline=False))
    done = train("logger=wandb", "logger.offline=false", "run_name=refused")
    assert done.code == 2
    assert "W&B refused (No API key configured" in done.err
    assert result_of(tmp_path / "logs/runs/refused")["status"] == "failed"
    file = tmp_path / "view.json"
    for text in ("{", '{"project": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"view.json: no view of a study \("):
            wandb_view.save_view(file)


def test_tags_are_checked_before_a_run_starts(train, tmp_path: Path) -> None:
    done = train("logger=wandb", f"logger.tags=[{'a' * 65}]")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert f"logger.tags = {'a' * 65}: give tags of 1 to 64 characters" in done.err
    assert not (tmp_path / "logs").exists()


def test_findings_hold_plain_values_only() -> None:
    assert json.loads(json.dumps(asdict(made_up())))["name"] == "night-1"
