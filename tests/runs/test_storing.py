"""artifact.method=gptq: a run stored by GPTQ is on its grid, scored from its file, and closer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qat.artifact.container import Artifact, read_artifact
from qat.budget.budget import Budget
from qat.golf.bundle import count_code_bytes
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.runs import storing
from qat.runs.result import Result
from qat.runs.store_again import FinishedRun, export_name
from qat.settings.schema import ArtifactSettings
from tests.conftest import Done, result_of

RUNS = Path("logs/runs")


@pytest.fixture
def stored(train: Callable[..., Done]) -> tuple[Path, Path]:
    """The same training rounded, and stored by GPTQ."""
    for name, method in (("rounded", "round"), ("by_gptq", "gptq")):
        done = train("grid=int3", f"artifact.method={method}", f"run_name={name}", "max_steps=40")
        assert done.code == 0, done.err
    return RUNS / "rounded", RUNS / "by_gptq"


def test_gptq_stores_other_codes_on_the_same_grid(stored: tuple[Path, Path]) -> None:
    rounded, by_gptq = (read_artifact(folder / "artifact.qat") for folder in stored)
    assert rounded.plan == by_gptq.plan
    for name, weight in rounded.weights.items():
        is_matrix = rounded.plan.entries[name].grid is not None
        assert torch.equal(weight, by_gptq.weights[name]) != is_matrix
    row = result_of(stored[1])
    assert row["grid"] == "int3+gptq"
    assert row["val_bpb_snapped"] == pytest.approx(row["val_bpb_artifact"], abs=1e-12)
    assert row["val_bpb_float"] == pytest.approx(result_of(stored[0])["val_bpb_float"], abs=1e-12)
    assert row["quant_gap_bpb"] < 0.5 * result_of(stored[0])["quant_gap_bpb"]


@pytest.mark.parametrize("more", [(), ("qat.stop_step=10",)], ids=["to its end", "stopped"])
def test_stored_again_as_it_was_it_is_the_same_file(
    more: tuple[str, ...], train: Callable[..., Done]
) -> None:
    """An average has scales of its own, but for a run whose scales ended with its QAT."""
    asked = ("qat=lsq4", "optimizer.learned_scale_lr=0.01", "averaging=ema", "qat.start_step=4")
    assert train(*asked, *more, "averaging.decay=0.5", "run_name=r").code == 0
    result = Result.read(RUNS / "r")
    assert result is not None
    run = FinishedRun(RUNS / "r", result, Console(quiet=True))
    artifact = ArtifactSettings(**result.settings["artifact"])
    budget = Budget(result.limit_bytes, count_code_bytes())
    again, score = run.store(run.plan, artifact, budget, RUNS / "r" / "again.qat")
    assert again.path.read_bytes() == (RUNS / "r" / "artifact.qat").read_bytes()
    assert score.val_bpb == result.val_bpb_artifact


OTHER = {  # of every setting that a file depends on
    "coder": "zlib", "method": "round", "gptq_bit_price": 0.50000001, "fill": False,
    "sensitivity_tokens": 1024,
}  # fmt: skip


@pytest.mark.parametrize("setting", [of.name for of in fields(ArtifactSettings)])
def test_exports_that_may_differ_have_two_names(setting: str) -> None:
    plan = build_plan({"w": (4, 8)}, {"grid": Grid(bits=4)}, {"*": "grid"})
    artifact = ArtifactSettings(method="gptq", gptq_bit_price=0.5, fill=True)
    name = export_name(plan, artifact, Budget(9000))
    assert name == export_name(plan, replace(artifact), Budget(9000))
    assert name != export_name(plan, replace(artifact, **{setting: OTHER[setting]}), Budget(9000))
    assert name != export_name(plan, artifact, Budget(9001))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("artifact.method=nearest",), "artifact.method = nearest: choose from round, gptq"),
        (
            ("artifact.gptq_bit_price=1",),
            "artifact.gptq_bit_price = 1: only with artifact.method",
        ),
        (
            ("artifact.method=gptq", "artifact.gptq_bit_price=-1"),
            "artifact.gptq_bit_price = -1: give 0 or more",
        ),
    ],
)
def test_mistakes(asked: tuple[str, ...], message: str, train: Callable[..., Done]) -> None:
    done = train(*asked)
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert message in done.err


@pytest.mark.slow
@pytest.mark.parametrize("bit_price", ["0", "0.5"])
def test_the_solvers_scales_are_made_finer_until_gptq_fills_the_limit(
    bit_price: str, train: Callable[..., Done]
) -> None:
    limit = count_code_bytes() + 24_000  # 2.5 bits a weight
    asked = (f"limit_bytes={limit}", "artifact.fill=true", "max_steps=40", "grid=int6")
    assert train(*asked, "run_name=rounded").code == 0
    by_gptq = ("artifact.method=gptq", f"artifact.gptq_bit_price={bit_price}", "run_name=by_gptq")
    done = train(*asked, *by_gptq)
    assert done.code == 0, done.err
    rounded, row = result_of(RUNS / "rounded"), result_of(RUNS / "by_gptq")
    for each in (rounded, row):
        assert 0.999 * 24_000 <= each["artifact_bytes"] <= 24_000
    assert row["grid"] == ("int6+fill+gptq" if bit_price == "0" else "int6+fill+gptq0.5")
    assert row["val_bpb_snapped"] == pytest.approx(row["val_bpb_artifact"], abs=1e-12)
    files = [read_artifact(RUNS / name / "artifact.qat") for name in ("rounded", "by_gptq")]
    codes = [{i.entry.name: i.coded.codes for i in f.encoded if i.coded} for f in files]
    assert any(not torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_a_file_that_gives_back_other_weights_is_scored_itself(
    train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: reading moves one weight. Equal weights are scored once."""

    def read_wrongly(path: Path) -> Artifact:
        artifact = read_artifact(path)
        artifact.weights["tok_emb.weight"][3] += 1.0
        return artifact

    monkeypatch.setattr(storing, "read_artifact", read_wrongly)
    assert train("qat=int4", "run_name=moved").code == 0
    row = result_of(RUNS / "moved")
    assert row["artifact_is_snapped"] is False
    assert row["val_bpb_artifact"] != row["val_bpb_snapped"]
