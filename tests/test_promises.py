"""Promises that cut across rooms: one grid end to end, true bytes, results, oversize, data path."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qat.artifact.container import read_artifact
from qat.golf.bundle import count_code_bytes
from qat.qat_model import weights_seen
from qat.runs.store_again import stored_tensors
from qat.settings.options import options
from qat.training.liveness import LivenessProof
from qat.training.loop import TrainingLoop
from tests.conftest import GOLF, ROOT, result_of

RUNS = Path("logs/runs")
GRIDS = [qat for qat in options("qat") if qat != "none"]
# One of each way to scales or levels by training itself; the others when there is time for them,
# and all of them without training in artifact/test_container.py.
TRAINED_ALWAYS = ("fp8_e4m3", "int4_asymmetric", "int6", "int8_golf", "lsq4", "rd", "ternary")
ROTATED = "int4 plan.rotate=16"


def value(text: str, key: str) -> float:
    match = re.search(rf"^{key}\s+(\S+)$", text, re.MULTILINE)
    assert match, text
    return float(match[1])


@pytest.fixture
def last_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the modules of the training process held in the forward pass after the last update."""
    seen: dict[str, torch.Tensor] = {}
    measure = LivenessProof.at_qat_end

    def spy(self: LivenessProof, loop: TrainingLoop) -> None:
        measure(self, loop)
        held = weights_seen(loop.model.model, loop.model.weights(), loop.last_batch[0][:1])
        seen.update({name: w.cpu() for name, w in held.items()})

    monkeypatch.setattr(LivenessProof, "at_qat_end", spy)
    return seen


@pytest.mark.parametrize(
    "qat",
    [
        ROTATED,
        *(pytest.param(g, marks=[] if g in TRAINED_ALWAYS else pytest.mark.slow) for g in GRIDS),
    ],
)
def test_seen_scored_and_stored_weights_are_one(qat: str, train, last_seen) -> None:
    """Bit for bit, passthrough tensors too: the forward pass with QAT on, and the file."""
    smallest = ["plan.grid_min_elements=2000"] if qat == "int8_golf" else []  # the model is tiny
    asked = f"qat={qat}".split()
    assert train(*asked, "qat.start_step=4", "run_name=r", *smallest).code == 0
    result = result_of(RUNS / "r")
    assert result["grid"].endswith("_h16") == (qat == ROTATED)
    assert result["on_grid_share"] == 1.0
    assert result["artifact_is_snapped"] is True
    assert result["val_bpb_snapped"] == result["val_bpb_artifact"]
    gap = result["val_bpb_artifact"] - result["val_bpb_float"]
    assert result["quant_gap_bpb"] == pytest.approx(gap, abs=1e-12)
    assert result["quant_gap_bpb"] != 0.0
    artifact = read_artifact(RUNS / "r" / "artifact.qat")
    assert set(last_seen) == set(artifact.weights)
    masters = stored_tensors(RUNS / "r" / "checkpoint.ckpt")[0]
    for name, w in artifact.weights.items():
        assert torch.equal(w.view(torch.int32), last_seen[name].view(torch.int32)), name
    for entry in artifact.plan.on_grid:
        assert not torch.equal(masters[entry.name], artifact.weights[entry.name])


def test_eval_scores_the_file_alone_as_training_did(finished: Path, program, cache_dir) -> None:
    result = result_of(finished)
    done = program("eval.py", f"artifact={finished}/artifact.qat", f"data.cache_dir={cache_dir}",
                   "eval.batch_tokens=2048")  # fmt: skip
    assert done.code == 0, done.err
    assert value(done.out, "val_bpb") == pytest.approx(result["val_bpb_artifact"], abs=1e-9)
    assert value(done.out, "val_loss") == pytest.approx(result["val_loss_artifact"], abs=1e-9)
    assert value(done.out, "artifact_bytes") == (finished / "artifact.qat").stat().st_size
    digits = re.search(r"^val_loss\s+\d+\.(\d+)$", done.out, re.MULTILINE)
    assert digits
    assert len(digits[1]) >= 8


def test_sample_writes_text(finished: Path, program, cache_dir: Path) -> None:
    arguments = (f"run={finished}", "task=sample", f"data.cache_dir={cache_dir}",
                 "sample.max_tokens=30", "prompt=The light, (and")  # fmt: skip
    done = program("eval.py", *arguments)
    assert done.code == 0, done.err
    assert done.out.startswith("The light, (and")
    assert len(done.out) > 20
    assert program("eval.py", *arguments).out == done.out


def test_bytes_are_those_on_disk_plus_the_code(finished: Path) -> None:
    result = result_of(finished)
    assert result["artifact_bytes"] == (finished / "artifact.qat").stat().st_size
    assert result["code_bytes"] == count_code_bytes()
    assert result["limit_bytes"] == 16_000_000


def test_folder_holds_what_is_promised(finished: Path) -> None:
    names = {p.name for p in finished.rglob("*") if p.is_file()}
    assert {"config.yaml", "overrides.yaml", "provenance.json", "train.log", "metrics.csv",
            "checkpoint.ckpt", "result.json", "artifact.qat"} <= names  # fmt: skip
    assert [n for n in names if "artifact" in n] == ["artifact.qat"]
    top = finished.parents[2]
    assert {p.name for p in top.iterdir()} == {"logs"}
    assert "profile: laptop" in (finished / "config.yaml").read_text()
    assert "QAT on since step 6" in (finished / "train.log").read_text()
    result = result_of(finished)
    for key in ("run_name", "seed", "profile", "qat", "grid", "steps", "tokens", "epochs",
                "train_seconds", "ms_per_step", "train_loss", "val_loss_float", "val_bpb_float",
                "val_bpb_snapped", "val_bpb_artifact", "quant_gap_bpb", "artifact_bytes",
                "code_bytes", "limit_bytes", "qat_first_step", "qat_steps", "qat_never_started",
                "on_grid_share", "hardware", "commit"):  # fmt: skip
        assert result[key] is not None, key


def test_equal_training_gives_equal_bytes_whatever_the_name_and_time(train) -> None:
    for name in ("first", "second"):
        assert train("qat=int6", f"run_name={name}", "logger.tags=[x]").code == 0
    a, b = ((RUNS / name / "artifact.qat").read_bytes() for name in ("first", "second"))
    assert a == b


def test_over_the_limit_the_file_is_kept_and_the_exit_code_is_3(train) -> None:
    done = train(f"limit_bytes={count_code_bytes() + 1000}", "run_name=big")
    assert done.code == 3
    assert f"limit_bytes = {count_code_bytes() + 1000}" in done.err
    result = result_of(RUNS / "big")
    assert result["status"] == "oversize"
    assert result["val_bpb_artifact"] > 0
    files = [p.name for p in (RUNS / "big").iterdir() if "artifact" in p.name]
    assert files == ["artifact.qat.oversize"]
    read_artifact(RUNS / "big" / files[0])


def test_exactly_at_the_limit_is_within_it(train) -> None:
    assert train("run_name=free").code == 0
    result = result_of(RUNS / "free")
    total = result["artifact_bytes"] + result["code_bytes"]
    assert train(f"limit_bytes={total}", "run_name=fits").code == 0
    assert train(f"limit_bytes={total - 1}", "run_name=over").code == 3


@pytest.mark.slow
def test_shards_given_by_path_replace_any_source(program) -> None:
    arguments = (
        f"data.val_files={GOLF}/fineweb_val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model",
    )  # fmt: skip
    done = program(
        "train.py", "profile=laptop", f"data.train_files={GOLF}/fineweb_train_*.bin", *arguments,
        "data=fineweb_sp1024", "model.vocab_size=512", "model.dim=64", "model.num_layers=2",
        "model.num_heads=2", "model.num_kv_heads=1", "seq_len=64", "batch_tokens=256",
        "budget_seconds=null", "max_steps=3", "run_name=shards",
    )  # fmt: skip
    assert done.code == 0, done.err
    path = RUNS / "shards" / "artifact.qat"
    assert str(GOLF).encode() not in path.read_bytes()
    done = program("eval.py", f"artifact={path}", *arguments)
    assert done.code == 0, done.err
    result = result_of(RUNS / "shards")
    assert value(done.out, "val_bpb") == pytest.approx(result["val_bpb_artifact"], abs=1e-9)
    assert program("eval.py", f"artifact={path}").code == 2


@pytest.mark.slow
def test_ctrl_c_is_recorded_and_exits_130(tiny: list[str], tmp_path: Path) -> None:
    """A real process, interrupted in the middle of training."""
    command = [sys.executable, str(ROOT / "train.py"), *tiny, "max_steps=null", "budget_seconds=99",
               "run_name=stopped", "logger.every_steps=1"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell that runs the tests in the background makes its children deaf to interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "logs/runs/stopped/metrics.csv"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    result = result_of(metrics.parent)
    assert (result["status"], result["error"]) == ("failed", "interrupted")
