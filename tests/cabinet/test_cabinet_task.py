"""``eval.py task=cabinet``: rows, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.text.shards import ShardWriter
from tests.conftest import result_of

QUICK = ("eval.repeats=2", "eval.resamples=50", "eval.batch_tokens=2048")
DYNAMIC = "torchao Float8DynamicActivationFloat8Weight"  # no CPU computes it
FEW = "variants=[fp32,bf16,rtn_int4,gptq_int4,torchao Float8Dynamic*,own_artifact]"
REPORTED = ("REPORT.md", "summary.json", "results.json", "manifest.json", "pareto_bytes.png",
            "pareto_latency.png", "tiers.png", "reliability.png", "roofline.png")  # fmt: skip


@pytest.fixture
def sweep(finished: Path, program, cache_dir: Path):
    """sweep(*arguments): on the shared run, into ./found."""
    return lambda *arguments: program(
        "eval.py", "task=cabinet", f"run={finished}", f"data.cache_dir={cache_dir}", "out=found",
        *QUICK, *arguments,
    )  # fmt: skip


@pytest.mark.slow
def test_a_row_per_variant_and_none_measured_twice(sweep, finished: Path) -> None:
    done = sweep("variants=[fp32,rtn_int8]")
    assert done.code == 0, done.err
    first = Path("found/fp32/metrics.json")
    stamp = first.stat().st_mtime_ns
    done = sweep(FEW)
    assert done.code == 0, done.err
    assert first.stat().st_mtime_ns == stamp
    assert "fp32:" not in done.err
    rows = {row["variant"]: row for row in json.loads(Path("found/results.json").read_text())}
    assert list(rows) == [
        "fp32", "bf16", "rtn_int4", "gptq_int4", DYNAMIC, "own_artifact",
    ]  # fmt: skip
    assert rows[DYNAMIC]["status"] == "unavailable"
    assert rows[DYNAMIC]["reason"]
    result = result_of(finished)
    assert rows["fp32"]["val_bpb"] == pytest.approx(result["val_bpb_float"], abs=1e-9)
    assert rows["fp32"]["gap_bpb"] == 0.0
    assert rows["fp32"]["tiers"] is None
    own = rows["own_artifact"]
    assert own["val_bpb"] == pytest.approx(result["val_bpb_artifact"], abs=1e-9)
    assert own["disk_bytes"] == result["artifact_bytes"]
    assert own["tiers"]["all"]["delta_bpb"]["estimate"] == pytest.approx(own["gap_bpb"], abs=1e-9)
    assert rows["bf16"]["weight_traffic_bytes"] == rows["fp32"]["weight_traffic_bytes"]
    for name in REPORTED:
        assert Path("found", name).stat().st_size > 0, name
    report = Path("found/REPORT.md").read_text()
    assert rows[DYNAMIC]["reason"] in report


@pytest.mark.slow
def test_a_damaged_sweep_goes_on_where_it_was(sweep) -> None:
    """As after kill -9: rows are whole or missing, and the missing ones are made."""
    assert sweep("variants=[fp32,rtn_int4]").code == 0
    before = json.loads(Path("found/rtn_int4/metrics.json").read_text())
    Path("found/rtn_int4/metrics.json").unlink()
    Path("found/results.json").unlink()
    done = sweep("variants=[fp32,rtn_int4]")
    assert done.code == 0, done.err
    assert "rtn_int4:" in done.err
    again = json.loads(Path("found/rtn_int4/metrics.json").read_text())
    noisy = {"latency_ms", "tokens_per_second", "peak_memory_bytes", "make_seconds"}
    noisy |= {f"{of}_speedup{low}" for of in ("latency", "throughput") for low in ("", "_low")}
    assert {k: v for k, v in again.items() if k not in noisy} == {
        k: v for k, v in before.items() if k not in noisy
    }


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (("variants=[nonsense*]",), "variants = ['nonsense*']: names none of fp32, bf16"),
        (("artifact=a.ckpt",), "give run=RUN or artifact=CHECKPOINT.ckpt (one of them)"),
        (("eval.stride=99",), "eval.stride = 99: must be at most"),
    ],
)
def test_mistakes_get_one_line(asked: tuple[str, ...], line: str, sweep) -> None:
    done = sweep(*asked)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert line in done.err


@pytest.mark.slow
def test_another_question_takes_another_folder(sweep, prepared_text: Path) -> None:
    assert sweep("variants=[rtn_ternary]").code == 0
    done = sweep("variants=[rtn_ternary]", "seed=2")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "out=found: its variants were measured with another seed" in done.err
    manifest = Path("found/manifest.json")
    said = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(said) | {"storing_code": "older"}))
    done = sweep("variants=[rtn_ternary]")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "out=found: its variants were measured with another storing_code; give ano" in done.err
    manifest.write_text(said)
    shards = Path("other")
    shards.mkdir()
    for file in prepared_text.iterdir():
        (shards / file.name).write_bytes(file.read_bytes())
    writer = ShardWriter(shards, "val")
    writer.write([1, *range(5, 300)] * 4)
    writer.close()
    done = sweep(
        "variants=[rtn_ternary]", "data.train_files=other/train_*.bin",
        "data.val_files=other/val_*.bin", "data.tokenizer=other/tokenizer.model",
    )  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "out=found: its variants were measured with another validation_text" in done.err


@pytest.mark.slow
def test_every_variant_is_measured_or_says_why_not(sweep) -> None:
    done = sweep()
    assert done.code == 0, done.err
    rows = json.loads(Path("found/results.json").read_text())
    assert len(rows) > 45
    for row in rows:
        if row["status"] == "unavailable":
            assert row["reason"], row
        else:
            assert row["disk_bytes"] > 0
            assert row["memory_bytes"] > 0
            assert row["val_bpb"] > 0
            assert row["latency_ms"] > 0
    measured = {row["variant"] for row in rows if row["status"] == "measured"}
    assert {"fp32", "rtn_int8", "gptq_int4_g64_e8", "own_artifact"} <= measured
