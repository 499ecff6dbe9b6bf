"""Every command with another architecture than the baseline: nothing asks for names of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qat.analysis import cost
from qat.artifact.container import read_artifact
from qat.golf.bundle import code_files
from tests.conftest import ROOT, first_on_path, result_of

LLAMA = ("model=llama_4x288", "model.num_layers=2", "model.dim=64", "model.num_heads=4",
         "model.num_kv_heads=2", "max_steps=6", "schedule.warmdown_steps=2")  # fmt: skip
RUNS = Path("logs/runs")
VARIANTS = ("fp32", "rtn_int8_tensor_folded", "gptq_int4", "gptq_self_int4_g64_e8",
            "gptq_sequential_int4_g64_e8", "awq_int4_e8", "smoothquant_w8a8", "lqer_int4_g64_e8",
            "hqq_int4_g64_e8", "torchao Int8WeightOnly", "bitsandbytes NF4", "rtn_q8_0",
            "own_artifact")  # fmt: skip


@pytest.fixture
def llama(train):
    return lambda *overrides: train(*LLAMA, *overrides)


@pytest.mark.slow
def test_trained_scored_sampled_and_stored_again(llama, program, cache_dir: Path) -> None:
    """One int6 run, and what is made of it."""
    done = llama("qat=int6", "qat.start_step=2", "run_name=r")
    assert done.code == 0, done.err
    row = result_of(RUNS / "r")
    assert (row["status"], row["on_grid_share"]) == ("finished", 1.0)
    assert row["val_bpb_artifact"] == row["val_bpb_snapped"]
    artifact = read_artifact(RUNS / "r" / "artifact.qat")
    assert artifact.meta["model"]["name"] == "llama"
    assert {e.name.split(".")[-2] for e in artifact.plan if e.grid is None} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip

    text = f"data.cache_dir={cache_dir}"
    done = program("eval.py", "run=r", text, "eval.batch_tokens=2048")
    assert done.code == 0, done.err
    match = re.search(r"^val_bpb\s+(\S+)$", done.out, re.MULTILINE)
    assert match
    assert float(match[1]) == pytest.approx(row["val_bpb_artifact"], abs=1e-9)
    for command in (
        ("task=sample", "run=r", text, "sample.max_tokens=4", "prompt=the"),
        ("task=inspect", "run=r"),
        ("task=fill", "run=r", f"limit_bytes={row['code_bytes'] + 20_000}"),
        ("task=submission", "run=r", "out=handed_in"),
    ):
        done = program("eval.py", *command)
        assert done.code == 0, (command, done.err)
    assert "model/llama.py" in " ".join(path.as_posix() for path in code_files())

    done = program("eval.py", "task=export", "run=r", "out=f.ptz")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "its model is a llama; the challenge's file is read as its own baseline" in done.err
    assert not Path("f.ptz").exists()


@pytest.mark.slow
def test_trained_to_bytes_and_by_gptq(llama) -> None:
    assert llama("qat=none", "grid=int4", "artifact.method=gptq", "run_name=gptq").code == 0
    row = result_of(RUNS / "gptq")
    assert row["grid"] == "int4+gptq"
    done = llama("qat=rd", "qat.start_step=3", "run_name=rd", "model.tie_embeddings=false")
    assert done.code == 0, done.err
    assert result_of(RUNS / "rd")["status"] == "finished"


@pytest.mark.slow
def test_everything_measured(llama, program, cache_dir: Path) -> None:
    assert llama("qat=none", "grid=int4", "run_name=r").code == 0
    quick = (f"data.cache_dir={cache_dir}", "eval.batch_tokens=2048", "eval.resamples=20",
             "eval.repeats=1")  # fmt: skip
    done = program("eval.py", "eval=full", "run=r", *quick, "eval.layers_tokens=256", "out=full")
    assert done.code == 0, done.err
    metrics = json.loads(Path("full/metrics.json").read_text())
    assert metrics["left_out"] == {}
    errors = {layer["tensor"]: layer["output_error"] for layer in metrics["layers"]}
    assert len(errors) == 2 * 7 + 1
    assert all(0.001 < error < 1 for error in errors.values()), errors


@pytest.mark.slow
def test_the_cabinet(llama, program, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "IN_TURN_SECONDS", 0.0)  # which variant is faster is not asked here
    done = llama("qat=none", "grid=int4", "run_name=r", "model.dim=96", "max_steps=60")
    assert done.code == 0, done.err
    done = program(
        "eval.py", "task=cabinet", "run=r", f"data.cache_dir={cache_dir}", "out=found",
        "eval.batch_tokens=2048", "eval.resamples=20", "eval.repeats=1",
        f"variants=[{','.join(VARIANTS)}]",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["variant"]: row for row in json.loads(Path("found/results.json").read_text())}
    assert rows.keys() == set(VARIANTS)
    assert rows["rtn_int8_tensor_folded"]["reason"] == "Llama has no channel scales to fold"
    made = {name: row for name, row in rows.items() if row["status"] == "measured"}
    assert {name for name in VARIANTS if name not in made} == {"rtn_int8_tensor_folded"}
    for name, row in made.items():
        assert abs(row["gap_bpb"]) < 0.2, name
        assert row["activation_bytes"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=mamba", "model.name = mamba: choose from gpt, llama"),
        ("+model.more.width=9", "model.more.width: llama has no such size"),
        ("+model.more.mlp_dim=9.5", "model.more.mlp_dim = 9.5: give a whole number above 0"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str, llama) -> None:
    done = llama(override)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert message in done.err


@pytest.mark.slow
def test_the_documented_model_is_two_files(tiny: list[str], tmp_path: Path) -> None:
    """docs/add_a_model.md, followed to the letter in a copy of the project."""
    page = (ROOT / "docs" / "add_a_model.md").read_text("utf-8")
    for name in ("qat", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "eval.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for kind, place in (("python", "qat/model/mean_mix.py"), ("yaml", "conf/model/mean_mix.yaml")):
        assert f"`{place}`" in page
        (tmp_path / place).write_text(re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0])
    commands = (
        ["train.py", "model=mean_mix", "qat=int6", *tiny, "qat.start_step=4", "run_name=r",
         "artifact.method=gptq"],
        ["eval.py", "eval=full", "run=r", "eval.resamples=20", "eval.repeats=1",
         "eval.layers_tokens=256", *(setting for setting in tiny if "data." in setting)],
        ["eval.py", "task=submission", "run=r", "out=handed_in"],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | first_on_path(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
    row = result_of(tmp_path / RUNS / "r")
    assert (row["on_grid_share"], row["status"]) == (1.0, "finished")
    model = read_artifact(tmp_path / RUNS / "r" / "artifact.qat").meta["model"]
    assert (model["name"], model["more"]) == ("mean_mix", {"power": 1.0})
