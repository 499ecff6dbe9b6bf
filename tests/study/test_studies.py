"""Studies: arms by one YAML, each run once, gone on with after a kill, and what they find."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hydra_plugins import qat_node_launcher
from qat.runs.run_folder import kept_checkpoint
from qat.settings import checks
from qat.settings.arguments import groups
from qat.settings.arms import with_arms
from qat.settings.command_line import register
from qat.settings.options import CONF, read_study
from qat.study import files
from qat.study.find_out import find_out
from qat.study.findings import Findings
from qat.study.study import Study
from tests.conftest import ROOT, Done, _call, first_on_path, result_of
from tests.offline_run import read_offline_run

RUNS = Path("logs/runs")
QUIET = Console(quiet=True)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ASKED = ("-m", "experiment=gptq", "seed=1,2", "max_steps=8", "ledger=full", "sweep_name=s")


@pytest.fixture(scope="module")
def gptq(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a finished study of 2 arms x 3 stores x 2 seeds, only read, and what it said"""
    parent = tmp_path_factory.mktemp("study")
    with contextlib.chdir(parent):
        done = _call("train.py", [*tiny, *ASKED])
    assert done.code == 0, done.err
    return parent / RUNS / "s", done


def found(folder: Path) -> Findings:
    (file,) = folder.glob("*.study.json")
    return find_out(folder, Study.read(file), QUIET)


def own_copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / RUNS / "s"))


def change(run: Path, **values: object) -> None:
    file = run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_design_composes(experiment: str) -> None:
    """All its arms, and what they say is what is set."""
    register([])
    study = read_study(experiment)
    assert study is not None
    for name, arm in study.arms.items():
        asked = [f"experiment={experiment}", f"arm={name}", "profile=laptop"]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            lines = with_arms(asked, groups("train"), is_sweep=False)
            config = hydra.compose("train", lines, return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        del config.hydra
        settings = checks.resolve_train(OmegaConf.to_object(config), choices)
        for key, value in arm.items():
            if key in groups("train"):
                assert choices[key] == value
            else:
                here: object = settings
                for part in key.split("."):
                    here = getattr(here, part)
                assert here == value
        assert settings.qat.enabled == (choices["qat"] != "none")


def test_a_study_is_a_folder_per_arm_and_seed(gptq: tuple[Path, Done]) -> None:
    folder, done = gptq
    runs = sorted(path.parent.name for path in folder.glob("*/result.json"))
    assert runs == ["int6_s1", "int6_s2", "none_s1", "none_s2"]
    row = result_of(folder / "int6_s2")
    assert (row["arm"], row["seed"], row["qat"]) == ("int6", 2, "int6")
    assert len(list(folder.glob("*/exports/*.json"))) == 10  # 2 stores each, none on int6 too
    assert (folder / "gptq" / "report.html").is_file()
    assert found(folder).headline in done.out


def test_treatments_are_arms_and_stores(gptq: tuple[Path, Done]) -> None:
    treatments = {t.name: t for t in found(gptq[0]).treatments}
    assert [*treatments] == [
        "none", "none/sdclip", "none/gptq", "int6", "int6/sdclip", "int6/gptq",
    ]  # fmt: skip
    assert treatments["none"].grid == "int6"
    assert treatments["none"].alike is None
    against = {name: t.alike.against for name, t in treatments.items() if t.alike}
    assert against["none/gptq"] == "none on int6"
    assert against["int6/sdclip"] == "none on int6_sigma12.85"
    assert against["int6/gptq"] == "none on int6+gptq"
    for t in treatments.values():
        if t.is_qat and t.alike:
            base = treatments[f"none/{t.store}" if t.store else "none"].val_bpb
            for seed, delta in t.alike.by_seed.items():
                assert delta == pytest.approx(t.val_bpb[seed] - base[seed], abs=1e-12)


def test_qat_is_compared_with_what_each_store_makes_of_the_baseline(
    gptq: tuple[Path, Done],
) -> None:
    """QAT rounded on its grid: does it beat GPTQ of the baseline on the same grid?"""
    findings = found(gptq[0])
    treatments = {t.name: t for t in findings.treatments}
    by_store = treatments["int6"].by_store
    assert {name: contrast.against for name, contrast in by_store.items()} == {
        "sdclip": "none by sdclip on int6_sdclip", "gptq": "none by gptq on int6",
    }  # fmt: skip
    assert [name for name, t in treatments.items() if t.by_store] == ["int6"]
    for name, contrast in by_store.items():
        assert contrast.val_bpb == treatments[f"none/{name}"].val_bpb
        for seed, delta in contrast.by_seed.items():
            ours = treatments["int6"].val_bpb[seed]
            assert delta == pytest.approx(ours - contrast.val_bpb[seed], abs=1e-12)
    assert [*findings.beside] == [
        "the baseline stored in the same way", "the baseline by sdclip on int6_sdclip",
        "the baseline by gptq on the same grid",
    ]  # fmt: skip
    report = (gptq[0] / "gptq" / "REPORT.md").read_text()
    for sentence in (findings.headline, *findings.details):
        assert sentence in report
    assert "| none by gptq on int6 |" in report


def test_a_report_asks_for_each_file_once(
    gptq: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms on one grid are compared with one file of their baseline."""
    asked = []

    def remember(folder: Path, result: object, target: object, *more: object) -> dict:
        asked.append((folder.name, json.dumps(target)))
        return {}

    monkeypatch.setattr(files, "export_again", remember)
    found(gptq[0])
    assert len(asked) == len(set(asked)) == 10  # two stores of four runs, and two baselines on int6


def test_a_store_that_fills_a_limit_is_not_beside_what_qat_stored(
    gptq: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "export_again", lambda *asked: {})
    folder = own_copy(gptq[0], tmp_path)
    file = folder / "gptq.study.json"
    study = json.loads(file.read_text())
    gptq_of_int6 = study["settings"]["stores"]["gptq"] | {"arms": ["int6"]}
    study["settings"]["stores"] = {"gptq": gptq_of_int6, "full": gptq_of_int6 | {"fill": True}}
    file.write_text(json.dumps(study))
    treatments = {t.name: t for t in found(folder).treatments}
    assert [*treatments] == ["none", "int6", "int6/gptq", "int6/full"]
    assert [*treatments["int6"].by_store] == ["gptq"]
    for seed in (1, 2):  # as if it had filled its limit itself
        settings = result_of(folder / f"int6_s{seed}")["settings"]
        filled = settings | {"artifact": settings["artifact"] | {"fill": True}}
        change(folder / f"int6_s{seed}", settings=filled)
    findings = found(folder)
    (int6,) = (t for t in findings.treatments if t.name == "int6")
    assert [*int6.by_store] == ["gptq", "full"]
    assert int6.by_store["full"].against == "none by full filled to the same limit"
    assert "the baseline by full filled to the same limit" in findings.beside


def test_the_ledger_adds_up_and_equal_steps_are_measured(gptq: tuple[Path, Done]) -> None:
    """Bounded by steps no step is lost, so the baseline's equal-steps run is the baseline."""
    findings = found(gptq[0])
    (ledger,) = findings.ledgers
    (int6,) = (t for t in findings.treatments if t.name == "int6")
    assert int6.alike is not None
    assert ledger.is_measured
    assert ledger.throughput.mean == 0.0
    total = ledger.throughput.mean + ledger.training.mean + ledger.gap.mean
    assert total == pytest.approx(ledger.total.mean, abs=1e-12)
    assert ledger.total.mean == pytest.approx(int6.alike.verdict.mean, abs=1e-12)
    gap = [result_of(gptq[0] / f"int6_s{seed}")["quant_gap_bpb"] for seed in (1, 2)]
    none = {t.name: t for t in findings.treatments}["none"].val_bpb
    gap_none = [none[s] - result_of(gptq[0] / f"none_s{s}")["val_bpb_float"] for s in (1, 2)]
    assert ledger.gap.mean == pytest.approx((sum(gap) - sum(gap_none)) / 2, abs=1e-12)


@pytest.mark.slow
def test_again_runs_nothing_and_finds_the_same(
    gptq: tuple[Path, Done], tmp_path: Path, train: Callable[..., Done]
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    files = [p for name in ("result.json", "train.log") for p in folder.rglob(name)]
    before = {p: p.read_bytes() for p in files}
    assert train(*ASKED).code == 0
    assert {p: p.read_bytes() for p in before} == before
    assert found(folder).treatments == found(gptq[0]).treatments


@pytest.mark.slow
def test_a_run_that_died_goes_on_and_only_that(
    gptq: tuple[Path, Done], tmp_path: Path, train: Callable[..., Done]
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    logs = {p: p.stat().st_mtime_ns for p in folder.glob("*/train.log")}
    (folder / "int6_s1" / "result.json").unlink()
    shutil.rmtree(folder / "none_s2")
    (folder / "none_s2").mkdir()
    (folder / "none_s2" / "choices.json").write_text("{}")  # killed while it took the folder
    assert train(*ASKED).code == 0
    changed = {p.parent.name for p, at in logs.items() if p.stat().st_mtime_ns != at}
    assert changed == {"int6_s1", "none_s2"}
    assert found(folder).treatments == found(gptq[0]).treatments


def test_a_planted_effect_is_found_with_its_size(gptq: tuple[Path, Done], tmp_path: Path) -> None:
    folder = own_copy(gptq[0], tmp_path)
    for seed, wobble in ((1, 1e-5), (2, -1e-5)):
        base = {t.name: t for t in found(folder).treatments}["none"].val_bpb[seed]
        change(folder / f"int6_s{seed}", val_bpb_artifact=base - 0.02 + wobble)
    (int6,) = (t for t in found(folder).treatments if t.name == "int6")
    assert int6.alike is not None
    assert int6.alike.verdict.mean == pytest.approx(-0.02, abs=1e-12)
    assert int6.alike.verdict.p_value is not None
    assert int6.alike.verdict.p_value < 0.001
    assert "QAT is better with int6 (by 0.0200 bits per byte" in found(folder).details[0]


def test_every_started_seed_is_named(gptq: tuple[Path, Done], tmp_path: Path) -> None:
    folder = own_copy(gptq[0], tmp_path)
    change(folder / "int6_s1", status="failed", error="train loss is nan", val_bpb_artifact=None)
    (folder / "none_s2" / "result.json").unlink()
    findings = found(folder)
    assert findings.seeds == [1, 2]
    (int6,) = (t for t in findings.treatments if t.name == "int6")
    assert int6.missing_seeds == {
        1: "train loss is nan", 2: "no baseline of this seed has a score"
    }  # fmt: skip
    assert int6.alike is None
    assert {(r["arm"], r["seed"], r["status"]) for r in findings.rows} == {
        ("none", 1, "finished"), ("none", 2, "unfinished"),
        ("int6", 1, "failed"), ("int6", 2, "finished"),
    }  # fmt: skip


@pytest.mark.slow
def test_a_seed_that_is_compared_is_not_called_missing(
    gptq: tuple[Path, Done], tmp_path: Path, program: Callable[..., Done]
) -> None:
    """Its baseline is there as it is stored alike; no more files can be made of it."""
    folder = own_copy(gptq[0], tmp_path)
    file = folder / "gptq.study.json"
    file.write_text(file.read_text().replace('"equal_bytes": false', '"equal_bytes": true'))
    for seed in (1, 2):
        (folder / f"none_s{seed}" / "checkpoint.ckpt").write_text("")
    (known,) = (folder / "none_s1" / "exports").glob("int6+gptq_*.json")
    known.unlink()
    (folder / "none_s2" / "result.json").unlink()
    assert program("eval.py", "task=report", "study=s").code == 0
    (int6,) = (t for t in found(folder).treatments if t.name == "int6")
    assert [*int6.alike.by_seed] == [1]
    assert int6.missing_seeds == {2: "no baseline of this seed has a score"}
    assert [*int6.notes] == [1]
    assert "none_s1 has no file of as many bytes: " in int6.notes[1]
    assert "none_s1 has no file by gptq: " in int6.notes[1]
    report = (folder / "gptq" / "REPORT.md").read_text()
    _, missing = report.split("Started, and not compared:\n\n")
    assert "- int6, seed 2: no baseline of this seed has a score" in missing.split("\n\n")[0]
    row = next(line for line in report.splitlines() if line.startswith("| int6 | int6 |"))
    assert " | 1 of 2 | none on int6 | " in row


def test_a_run_whose_qat_never_started_is_not_one_of_qat(
    gptq: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    change(folder / "int6_s1", qat_never_started=True, qat_steps=0)
    findings = found(folder)
    treatments = {t.name: t for t in findings.treatments}
    for name in ("int6", "int6/gptq"):
        assert treatments[name].missing_seeds == {1: "its QAT never started"}
        assert [*treatments[name].alike.by_seed] == [*treatments[name].val_bpb] == [2]
    (row,) = (row for row in findings.rows if row["run_name"] == "int6_s1")
    assert "QAT NEVER STARTED" in row["note"]


def test_an_arm_that_failed_in_all_seeds_is_in_the_table(
    gptq: tuple[Path, Done], tmp_path: Path, program: Callable[..., Done]
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    for seed in (1, 2):
        change(folder / f"int6_s{seed}", status="failed", error=f"no {seed}", val_bpb_artifact=None)
        (folder / f"none_s{seed}" / "checkpoint.ckpt").write_text("")
    shutil.rmtree(folder / "none_s2" / "exports")
    treatments = {t.name: t for t in found(folder).treatments}
    assert [*treatments] == [
        "none", "none/sdclip", "none/gptq", "int6", "int6/sdclip", "int6/gptq",
    ]  # fmt: skip
    for name in ("int6", "int6/sdclip", "int6/gptq"):
        dead = treatments[name]
        assert (dead.val_bpb, dead.alike, dead.is_qat) == ({}, None, True)
        assert dead.missing_seeds == {1: "no 1", 2: "no 2"}
    assert [*treatments["none/sdclip"].val_bpb] == [1]
    assert "checkpoint.ckpt" in treatments["none/sdclip"].missing_seeds[2]
    assert program("eval.py", "task=report", "study=s").code == 0
    report = (folder / "gptq" / "REPORT.md").read_text()
    assert "| int6 | int6 | – | – | 0 |" in report
    assert "| int6/gptq |  | – | – | 0 |" in report
    assert "- int6/gptq, seed 2: no 2" in report


def test_runs_of_other_machines_are_not_pairs(gptq: tuple[Path, Done], tmp_path: Path) -> None:
    folder = own_copy(gptq[0], tmp_path)
    change(folder / "int6_s1", hardware="another")
    (int6,) = (t for t in found(folder).treatments if t.name == "int6")
    assert int6.missing_seeds == {1: "its baseline had other hardware"}
    assert int6.alike is not None
    assert [*int6.alike.by_seed] == [2]


@pytest.mark.parametrize(
    ("setting", "missing"),
    [
        ("max_steps", {1: "its baseline had other max_steps"}),
        ("limit_bytes", {}),
        ("run_name", {}),
    ],
)
def test_arms_differ_in_nothing_but_what_the_design_varies(
    setting: str, missing: dict[int, str], gptq: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    settings = result_of(folder / "int6_s1")["settings"]
    change(folder / "int6_s1", settings=settings | {setting: 7})
    (int6,) = (t for t in found(folder).treatments if t.name == "int6")
    assert int6.missing_seeds == missing
    file = folder / "gptq.study.json"
    study = json.loads(file.read_text())
    study["settings"]["arms"]["int6"][setting] = 7
    file.write_text(json.dumps(study))
    (int6,) = (t for t in found(folder).treatments if t.name == "int6")
    assert int6.missing_seeds == {}


def test_arms_of_another_commit_are_pairs_with_a_note(
    gptq: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    change(folder / "int6_s1", commit="0123456789abcdef")
    findings = found(folder)
    (int6,) = (t for t in findings.treatments if t.name == "int6")
    assert [*int6.alike.by_seed] == [1, 2]
    assert [*int6.notes] == [1]
    assert int6.notes[1].startswith("trained by commit 012345678, none_s1 by ")
    notes = {row["run_name"]: row["note"] for row in findings.rows}
    shared = [f"first 4 updates made by none_s{seed}" for seed in (1, 2)]
    assert notes == {
        "none_s1": "", "none_s2": "", "int6_s1": f"{shared[0]}; {int6.notes[1]}",
        "int6_s2": shared[1],
    }  # fmt: skip


def test_other_settings_in_the_same_folder_are_refused(
    gptq: tuple[Path, Done], tmp_path: Path, train: Callable[..., Done]
) -> None:
    own_copy(gptq[0], tmp_path)
    done = train(*ASKED, "max_steps=9")
    assert done.code == 2
    assert "sweep_name=s: none_s1 was run there with max_steps = 8, not 9" in done.err


@pytest.mark.slow
def test_seeds_of_an_arm_differ_in_nothing_else(
    gptq: tuple[Path, Done], tmp_path: Path, train: Callable[..., Done]
) -> None:
    own_copy(gptq[0], tmp_path)
    done = train(*ASKED, "seed=3", "max_steps=9")
    assert done.code == 2
    assert "sweep_name=s: none_s1 was run there with max_steps = 8, not 9" in done.err
    done = train(*ASKED, "seed=3", "max_steps=8,9")
    assert done.code == 2
    done = train(*ASKED, "seed=3", "max_steps=8,9", "sweep_name=other")
    assert done.code == 2
    assert "max_steps: two runs of arm none and seed 3 would differ in it" in done.err
    assert not (tmp_path / RUNS / "other").exists()


@pytest.mark.slow
def test_seeds_that_begin_with_the_same_weights_read_the_text_from_elsewhere(
    train: Callable[..., Done], tmp_path: Path
) -> None:
    assert train("run_name=base", "max_steps=2").code == 0
    asked = ("-m", "experiment=finetune", "arm=none", "seed=1,2", "model.init_from=base",
             "max_steps=2", "schedule.warmdown_steps=null", "sweep_name=s")  # fmt: skip
    plain = ("-m", "seed=1,2", "model.init_from=base", "sweep_name=s", "max_steps=2")
    for one_run in ((*asked, "data_seed=null"), (*asked, "data_seed=7"), plain):
        done = train(*one_run)
        assert done.code == 2
        same = "seed=1,2: both begin with the weights of model.init_from and read the same text"
        assert same in done.err
        assert not (tmp_path / RUNS / "s").exists()
    done = train(*asked)  # the study says data_seed=${seed}
    assert done.code == 0, done.err
    rows = [result_of(RUNS / "s" / f"none_s{seed}") for seed in (1, 2)]
    assert [row["settings"]["data_seed"] for row in rows] == [1, 2]
    assert rows[0]["val_loss_float"] != rows[1]["val_loss_float"]
    findings = find_out(RUNS / "s", Study.read(RUNS / "s" / "finetune.study.json"), QUIET)
    assert [t.notes for t in findings.treatments if t.name == "none"] == [{}]
    done = train(*asked, "data_seed=7")
    assert done.code == 2
    assert "sweep_name=s: none_s1 was run there with data_seed = 1, not 7" in done.err
    done = train(*asked, "seed=3", "data_seed=2")  # by one seed a command
    assert done.code == 2
    assert "seed=2,3: both begin with the weights of model.init_from" in done.err


@pytest.mark.parametrize("more", ["data_seed=1,2", "ledger=full,estimate"])
def test_a_run_is_an_arm_and_a_seed(train: Callable[..., Done], more: str) -> None:
    done = train("-m", "experiment=gptq", "arm=none", "seed=1", "sweep_name=s", more)
    assert done.code == 2
    what = more.partition("=")[0]
    assert f"error: {what}: two runs of arm none and seed 1 would differ in it" in done.err


def test_seeds_of_an_arm_that_differ_in_more_are_noted(
    gptq: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    for arm in ("none", "int6"):
        settings = result_of(folder / f"{arm}_s2")["settings"]
        change(folder / f"{arm}_s2", settings=settings | {"max_steps": 9}, hardware="another")
    treatments = {t.name: t for t in found(folder).treatments}
    for arm in ("none", "int6"):
        assert treatments[arm].notes == {2: f"max_steps = 9, and 8 in {arm}_s1: not one training"}
    assert [*treatments["int6"].alike.by_seed] == [1, 2]


@pytest.mark.slow
def test_designs_share_the_arms_that_both_name(
    gptq: tuple[Path, Done], tmp_path: Path, train: Callable[..., Done]
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    log = (folder / "none_s1" / "train.log").read_text()
    asked = ("experiment=bits", "arm=none,int3", "seed=1", "max_steps=8", "sweep_name=s")
    done = train("-m", *asked)
    assert done.code == 0, done.err
    assert (folder / "none_s1" / "train.log").read_text() == log
    bits = find_out(folder, Study.read(folder / "bits.study.json"), QUIET)
    stored = {"none", "none/gptq", "int3", "int3/gptq"}
    assert {t.name for t in bits.treatments} == stored
    (int3,) = (t for t in bits.treatments if t.name == "int3")
    assert int3.equal_bytes is not None
    assert int3.equal_bytes.against == "none filled to int3's bytes"
    assert 0.999 <= int3.equal_bytes.total_bytes[1] / int3.total_bytes[1] <= 1.0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("experiment=bits", "arm=int9"), "arm=int9: choose from none, int8, int6, int5, int4, i"),
        (("experiment=bits", "arm=int4", "grid=int6"), "drop grid=int6"),
        (("-m", "experiment=gptq", "grid.bits=3"), "grid.bits=3: experiment=gptq has grids of its"),
        (("-m", "experiment=bits", "seed=range(1,2,0)"), "seed=range(1,2,0): range() arg 3 must"),
        (("experiment=bits", "arm=int4", "qat=int6"), "qat=int6: arm=int4 of the experiment sets"),
        (("experiment=bits",), "give one arm=NAME, or -m"),
        (("arm=int4",), "arm=int4: goes with an experiment that has arms"),
        (
            ("-m", "experiment=bits", "arm=none,int4", "seed=1", "ledger=half"),
            "ledger = half: choose from estimate, full",
        ),
    ],
)
def test_mistakes(asked: tuple[str, ...], message: str, train: Callable[..., Done]) -> None:
    done = train(*asked)
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert message in done.err
    assert not RUNS.exists()


@pytest.mark.slow
def test_what_another_arm_varies_is_no_excuse(train: Callable[..., Done]) -> None:
    """A baseline without an average is not that of an arm which was typed with one."""
    asked = ("-m", "experiment=averaging", "seed=1", "sweep_name=s", "max_steps=8")
    assert train(*asked, "arm=none").code == 0
    assert train(*asked, "arm=int4", "averaging=swa").code == 0
    folder = RUNS / "s"
    findings = find_out(folder, Study.read(folder / "averaging.study.json"), QUIET)
    (int4,) = (t for t in findings.treatments if t.name == "int4")
    assert int4.alike is None
    assert "its baseline had other averaging" in int4.missing_seeds[1]


def test_one_arm_alone(train: Callable[..., Done]) -> None:
    done = train("experiment=bits", "arm=int4", "run_name=one", "max_steps=4")
    assert done.code == 0, done.err
    assert result_of(RUNS / "one")["grid"] == "int4"


@pytest.mark.parametrize("content", ["", "{}", '{"name": "gptq"}'])
def test_a_damaged_study_is_one_line(
    content: str, gptq: tuple[Path, Done], tmp_path: Path, program: Callable[..., Done]
) -> None:
    folder = own_copy(gptq[0], tmp_path)
    (folder / "gptq.study.json").write_text(content)
    done = program("eval.py", "task=report", "study=s")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "gptq.study.json: not a study" in done.err


NODE = ("-m", "hydra/launcher=node", "hydra.launcher.ranks=2", "experiment=pair", "arm=none,int6",
        "sweep_name=pair", "max_steps=4")  # fmt: skip


@pytest.mark.slow
def test_a_study_on_all_ranks_of_a_node(tiny: list[str], tmp_path: Path) -> None:
    """Each run by torchrun; given again, only a run that failed is tried again."""
    command = [sys.executable, str(ROOT / "train.py"), *tiny, *NODE, "seed=1"]
    environment = os.environ | first_on_path(ROOT) | {"OMP_NUM_THREADS": "1"}

    def launch(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = launch("model.init_from=no.pt", "arm=none")
    assert done.returncode == 2, done.stderr
    assert "none_s1: exit code" in done.stderr
    done = launch()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / RUNS / "pair"
    assert (folder / "pair" / "REPORT.md").is_file()
    rows = {path: path.read_bytes() for path in folder.glob("*/result.json")}
    assert sorted(path.parent.name for path in rows) == ["int6_s1", "none_s1"]
    assert all("2 ranks" in json.loads(row)["hardware"] for row in rows.values())
    assert result_of(folder / "int6_s1")["forked_from"] == "none_s1"
    change(folder / "int6_s1", status="failed")
    assert launch().returncode == 0
    assert (folder / "none_s1" / "result.json").read_bytes() == rows[folder / "none_s1/result.json"]
    assert result_of(folder / "int6_s1")["status"] == "finished"


@pytest.mark.slow
def test_what_a_study_on_a_node_runs(
    train: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored runs are left alone, others begun or gone on with; its exit code is the highest."""
    assert train(*NODE[:1], *NODE[3:], "seed=1", "arm=none").code == 0  # with the usual launcher
    folder, asked = RUNS / "pair", []
    shutil.copytree(folder / "none_s1", folder / "none_s2")
    change(folder / "none_s2", status="failed", seed=2)
    config = folder / "none_s2" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1\n", "seed: 2\n"))

    def exit_code(command: list[str]) -> int:
        asked.append(command)
        kept = kept_checkpoint(folder / "none_s2", 2)
        if command[-1].startswith("resume=") and not kept.parent.exists():
            kept.parent.mkdir()
            kept.touch()
        return 3

    monkeypatch.setattr(qat_node_launcher, "exit_code", exit_code)
    done = train(*NODE, "seed=1,2")
    assert done.code == 3
    assert "none_s2: exit code 3" in done.err
    whole, resumed, forked = asked  # none_s1 kept nothing; what goes on from none_s2 comes last
    start = ["--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    assert resumed[3:] == [*start, f"resume={folder}/none_s2"]
    for command, seed in ((whole, 1), (forked, 2)):
        assert command[3:6] == start
        assert command[-2:] == [f"runs_dir={folder}", f"run_name=int6_s{seed}"]
        assert {f"seed={seed}", "arm=int6", "experiment=pair"} <= set(command)
    assert "fork.run=none_s2" in forked
    assert not any(word.startswith("fork.") for word in whole)
    kept_checkpoint(folder / "none_s2", 2).unlink()
    asked.clear()
    done = train(*NODE, "seed=2")
    assert "none_s2 kept nothing after 2 updates: int6_s2 makes them all" in done.out
    assert not any(word.startswith(("fork.run", "fork.step")) for word in asked[-1])


@pytest.mark.slow
def test_a_report_logged_to_wandb_is_in_the_group_of_its_runs(
    gptq: tuple[Path, Done], tmp_path: Path, program: Callable[..., Done]
) -> None:
    own_copy(gptq[0], tmp_path)
    done = program("eval.py", "task=report", "study=s", "logger=wandb")
    assert done.code == 0, done.err
    assert "wandb sync" in done.out
    logged = read_offline_run(tmp_path / RUNS / "s" / "gptq")
    assert (logged.run.run_group, logged.run.job_type) == ("s", "comparison")
    (int6,) = (t for t in found(tmp_path / RUNS / "s").treatments if t.name == "int6")
    assert int6.alike is not None
    assert logged.summary["int6/delta_bpb"] == int6.alike.verdict.mean


@pytest.mark.slow
def test_kill_9_and_again(tiny: list[str], tmp_path: Path, train: Callable[..., Done]) -> None:
    """Killed three times at moments of its own; finished runs are left as they are."""
    asked = ["-m", "experiment=pair", "seed=1,2", "max_steps=150", "checkpoint.every_steps=10"]
    command = [sys.executable, str(ROOT / "train.py"), *tiny, *asked]
    finished: dict[Path, bytes] = {}
    for _ in range(3):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        wanted, until = len(finished) + 1, time.monotonic() + 120
        while len(list((tmp_path / RUNS).glob("pair/*/result.json"))) < wanted:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {p: p.read_bytes() for p in (tmp_path / RUNS).glob("pair/*/result.json")}
        assert all(now[path] == text for path, text in finished.items())
        finished = now
    assert train(*asked).code == 0
    assert all(path.read_bytes() == text for path, text in finished.items())
    killed = found(tmp_path / RUNS / "pair").treatments
    assert train(*asked, "sweep_name=whole").code == 0
    assert killed == found(tmp_path / RUNS / "whole").treatments


@pytest.mark.slow
def test_a_launcher_runs_the_arms(tiny: list[str], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *tiny, "experiment=pair", "seed=1,2",
         "max_steps=8", "hydra/launcher=parallel"],
        cwd=tmp_path, env=environment | first_on_path(ROOT), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(path.read_text()) for path in (tmp_path / RUNS).glob("pair/*/result.json")]
    threads = max(1, (os.cpu_count() or 1) // 2)  # of the two runs at a time
    assert [row["hardware"].endswith(f", {threads} threads") for row in rows] == [True] * 4
    assert "written: logs/runs/pair/pair/" in done.stdout
