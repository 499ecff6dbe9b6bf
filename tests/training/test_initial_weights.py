"""``model.init_from``: what this program and others leave of a model, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qat.artifact.container import read_artifact
from qat.errors import UserError
from qat.model.registry import model_of
from qat.model.spec import ModelSpec
from qat.qat_model import QatModel
from qat.quantize.grid import Grid
from qat.quantize.plan import Plan
from qat.runs.store_again import stored_tensors
from qat.settings.schema import ModelSettings
from qat.training.build import build_model
from qat.training.initial_weights import data_of_source, spec_of_source
from tests.conftest import result_of

RUNS = Path("logs/runs")
TINY = ModelSpec(64, 1, 32, 2, 2, 2, True)


def same(path: str, spec, expected: dict[str, torch.Tensor]) -> bool:
    model = build_model(ModelSettings(**vars(spec), init_from=path), 1)
    state = model.state_dict()
    return all(torch.equal(state[name], w) for name, w in expected.items())


@pytest.mark.slow
def test_a_run_its_files_and_its_name(train) -> None:
    assert train("averaging=ema", "run_name=base", "model.num_layers=3").code == 0
    folder = RUNS / "base"
    averaged = stored_tensors(folder / "checkpoint.ckpt")[0]
    stored = read_artifact(folder / "artifact.qat").weights
    sources = {"": averaged, "checkpoint.ckpt": averaged, "artifact.qat": stored}
    for name, expected in sources.items():
        spec = spec_of_source(folder / name)
        assert spec is not None
        assert spec.num_layers == 3
        assert same(str(folder / name), spec, expected)
    # By its name; without rates nothing moves.
    asked = ["model.init_from=base", "model.num_layers=3", "optimizer.lr_scale=0"]
    done = train(*asked, "run_name=more", "max_steps=1")
    assert done.code == 0, done.err
    more = stored_tensors(RUNS / "more" / "checkpoint.ckpt")[0]
    assert all(torch.equal(more[name], w) for name, w in averaged.items())
    scored, again = result_of(folder)["val_bpb_float"], result_of(RUNS / "more")["val_bpb_float"]
    assert again == pytest.approx(scored, abs=1e-6)
    assert "other training" not in done.err
    row = result_of(folder)
    row["data"]["val"] = "0"
    (folder / "result.json").write_text(json.dumps(row))
    done = train(*asked, "run_name=other", "max_steps=1")
    told = "init_from=logs/runs/base was trained with other validation text than this run"
    assert told in " ".join(done.err.split())
    done = train("model.init_from=base")  # of two layers, by the options of these tests
    assert done.code == 2
    assert "model.init_from=logs/runs/base: not weights of this model (the model has no" in done.err


def test_what_wrappers_leave_on_names_is_taken_off(train, tmp_path: Path) -> None:
    assert train("run_name=base", "max_steps=1").code == 0
    spec = spec_of_source(RUNS / "base")
    assert spec is not None
    weights = stored_tensors(RUNS / "base" / "checkpoint.ckpt")[0]
    for prefix in ("", "_orig_mod.", "module.", "model.", "_orig_mod.module."):
        named = {prefix + name: w for name, w in weights.items()}
        for whole in (named, {"model": named, "step": 3}, {"state_dict": named}):
            torch.save(whole, tmp_path / "m.pt")
            assert spec_of_source(tmp_path / "m.pt") is None
            assert same(str(tmp_path / "m.pt"), spec, weights), prefix
    torch.save({"model": 3}, tmp_path / "m.pt")
    with pytest.raises(UserError, match="not a dict of name -> tensor"):
        same(str(tmp_path / "m.pt"), spec, weights)
    for more in ({}, {"averaging": 3}, {"identity": 3}):
        torch.save({"weights": weights, "progress": 3} | more, tmp_path / "m.pt")
        with pytest.raises(UserError, match="a checkpoint, but none of this version"):
            same(str(tmp_path / "m.pt"), spec, weights)


def test_damaged_sources(train) -> None:
    assert train("run_name=base", "max_steps=1").code == 0
    folder = RUNS / "base"
    spec = spec_of_source(folder)
    (folder / "artifact.qat").write_bytes(b"QATMODEL and no more")
    with pytest.raises(UserError, match=r"model.init_from=.*artifact.qat: not a readable artifact"):
        spec_of_source(folder / "artifact.qat")
    (folder / "checkpoint.ckpt").unlink()
    with pytest.raises(UserError, match=r"not weights of this model \(No such file"):
        same(str(folder), spec, {})
    (folder / "config.yaml").write_text("model: [1]")
    with pytest.raises(ValueError, match="it describes no model"):
        spec_of_source(folder)


def test_a_run_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "int6_sigma12.85"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {source: files, files: [a.txt], " + "}")
    with pytest.raises(ValueError, match="damaged"):  # not all of its settings: they are read
        data_of_source(folder)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({0: torch.zeros(2)}, "not a dict of name -> tensor"),
        ({"w": 3}, "not a dict of name -> tensor"),
        ({"w": torch.zeros(2).to_sparse()}, "w is no plain tensor"),
        ({"w": torch.zeros(2, device="meta")}, "w is no plain tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_named(held: dict, said: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        build_model(ModelSettings(**vars(TINY), init_from=str(tmp_path / "w.pt")), 1)


def test_the_file_of_an_own_loop(tmp_path: Path) -> None:
    """It says nothing of its model."""
    torch.manual_seed(0)
    model = QatModel(model_of(TINY), Plan.for_model(model_of(TINY), Grid(bits=8)))
    model.save(tmp_path / "own.qat")
    assert spec_of_source(tmp_path / "own.qat") is None
    assert same(str(tmp_path / "own.qat"), TINY, model.snapped())


@pytest.mark.slow
def test_what_a_run_began_with_is_known_by_content_and_needed_once(train, program) -> None:
    assert train("run_name=base", "max_steps=2").code == 0
    assert train("run_name=other", "seed=2", "max_steps=2").code == 0
    asked = ("model.init_from=base", "max_steps=4", "fork.keep_steps=[2]")
    assert train(*asked, "run_name=r").code == 0
    before = result_of(RUNS / "r")
    shutil.rmtree(RUNS / "base")
    shutil.copytree(RUNS / "other", RUNS / "base")
    done = train(*asked, "run_name=tail", "fork.run=r", "fork.step=2")
    assert done.code == 2
    assert "model.init_from has other weights" in done.err
    shutil.rmtree(RUNS / "base")
    (RUNS / "r" / "result.json").unlink()
    done = program("train.py", "resume=r")
    assert done.code == 0, done.err
    assert result_of(RUNS / "r")["data"] == before["data"]
