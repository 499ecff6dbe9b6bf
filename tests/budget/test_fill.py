"""``artifact.fill`` and ``eval.py task=fill`` end to end, on trained models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from qat.artifact.container import read_artifact
from qat.budget import fill as fill_file
from qat.budget.budget import Budget
from qat.budget.fill import BudgetSolver, TrainedModel
from qat.budget.search import WINDOW
from qat.golf.bundle import count_code_bytes
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.ptq.calibration import calibration_batches
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.settings.schema import DataSettings
from qat.text.shards import TokenStream
from qat.text.source import from_settings
from qat.training.muon import Muon
from tests.conftest import result_of

CODE = count_code_bytes()
RUNS = Path("logs/runs")
FIT = ("artifact.fill=true", "artifact.sensitivity_tokens=2048")


def window(budget: int) -> tuple[float, int]:
    return WINDOW * budget, budget


def test_a_run_fills_its_limit(train) -> None:
    done = train("qat=none", "grid=int6", *FIT, f"limit_bytes={CODE + 45_000}", "run_name=f")
    assert done.code == 0, done.err
    result = result_of(RUNS / "f")
    low, high = window(45_000)
    assert low <= result["artifact_bytes"] <= high
    assert result["artifact_bytes"] == (RUNS / "f" / "artifact.qat").stat().st_size
    assert result["val_bpb_snapped"] == result["val_bpb_artifact"]
    assert result["grid"] == "int6+fill"
    assert (RUNS / "f" / "rd.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen by the budget solver" in done.err
    assert "will not fit" not in done.err


@pytest.mark.slow
def test_after_qat_the_trained_grid_is_kept_where_it_fits(train, program, cache_dir) -> None:
    """With room to spare nothing is gained by leaving the grid that the model was trained on."""
    assert train("qat=int6", "qat.start_step=5", "run_name=q").code == 0
    plain = RUNS / "q" / "artifact.qat"
    done = program("eval.py", "task=fill", "run=q", f"data.cache_dir={cache_dir}", "out=kept.qat")
    assert done.code == 0, done.err
    assert "as planned" in done.err
    kept, trained = read_artifact(Path("kept.qat")), read_artifact(plain)
    assert kept.plan == trained.plan
    assert all(torch.equal(kept.weights[name], w) for name, w in trained.weights.items())
    size = plain.stat().st_size - 8_000
    done = program("eval.py", "task=fill", "run=q", f"limit_bytes={CODE + size}")
    assert done.code == 0, done.err
    low, high = window(size)
    fitted = RUNS / "q" / "exports" / f"fill_{CODE + size}.qat"
    assert low <= fitted.stat().st_size <= high
    assert fitted.with_suffix(".png").is_file()
    again = program("eval.py", "task=fill", "run=q", f"limit_bytes={CODE + size}")
    assert again.code == 2
    assert "is there already" in again.err


@pytest.mark.slow
def test_a_limit_that_nothing_meets_ends_oversize(train) -> None:
    done = train("qat=none", *FIT, f"limit_bytes={CODE + 1000}", "run_name=big")
    assert done.code == 3
    assert "nothing in the family is smaller" in done.err
    assert (RUNS / "big" / "artifact.qat.oversize").is_file()


@pytest.mark.slow
def test_learned_scales_are_kept(train, program) -> None:
    assert train("qat=lsq4", "qat.start_step=2", "run_name=l").code == 0
    assert program("eval.py", "task=fill", "run=l", "out=l.qat").code == 0
    trained = read_artifact(RUNS / "l" / "artifact.qat")
    kept = read_artifact(Path("l.qat"))
    assert all(torch.equal(kept.weights[name], w) for name, w in trained.weights.items())


@pytest.mark.slow
def test_a_baseline_is_filled_beside_an_arm_that_fills(train, program) -> None:
    assert train("qat=none", "grid=int6", "run_name=n").code == 0
    assert train("qat=int6", *FIT, f"limit_bytes={CODE + 45_000}", "run_name=q").code == 0
    done = program("eval.py", "task=report", "runs=logs/runs/*")
    assert done.code == 0, done.err
    rows = json.loads((RUNS / "report.json").read_text())
    exported = next(row for row in rows if row["exported"])
    low, high = window(45_000)
    assert low <= exported["artifact_bytes"] <= high
    assert exported["grid"] == "int6+fill"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("task=fill",), "run = null"),
        (("task=fill", "artifact=a.qat"), "run = null"),
        (("task=fill", "run=RUN", "out=a.ptz"), "out = a.ptz"),
        (("task=fill", "run=RUN", "limit_bytes=0"), "limit_bytes = 0"),
        (("task=fill", "run=nowhere"), "run=nowhere"),
    ],
)
def test_bad_input(program, finished: Path, arguments: tuple[str, ...], line: str) -> None:
    done = program("eval.py", *(a.replace("RUN", str(finished)) for a in arguments))
    assert done.code == 2
    assert line in done.err
    assert done.err.count("error:") == 1


def test_a_run_without_checkpoint_is_refused(program, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "checkpoint.ckpt").unlink()
    done = program("eval.py", "task=fill", f"run={folder}")
    assert done.code == 2
    assert "checkpoint" in done.err


LAPTOP = ModelSpec(1024, 4, 288, 6, 3, 2, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds_three_limits_on_the_laptop_model(seed: int) -> None:
    """A few real steps of Muon on the default corpus, then 2.2, 3 and 4.5 bits per weight."""
    source = from_settings(DataSettings(source="web_bible"), LAPTOP.vocab_size)
    stream = TokenStream(source.train_files, "data.train_files")
    torch.manual_seed(seed)
    gpt = GPT(LAPTOP)
    matrices = [p for name, p in gpt.named_parameters() if p.dim() == 2 and "blocks" in name]
    optimizers = [
        Muon([p for p in matrices if p.shape[0] > 2], lr=0.04, momentum=0.9),
        torch.optim.Adam([gpt.tok_emb.weight], lr=0.05),
    ]
    batches = calibration_batches(stream, 12 * 1024, 1024, 256)
    for ids, targets in batches:
        loss = gpt(ids, targets)
        gpt.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    weights = {name: p.detach() for name, p in gpt.named_parameters()}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    plan = build_plan(shapes, {"grid": Grid(bits=6)}, {"*.weight": "grid", "*": "fp32"})
    model = TrainedModel(LAPTOP, weights, plan, {}, is_on_grid=False)
    solver = BudgetSolver(model, batches[:2], "fp32", Console(quiet=True))
    num_weights = sum(entry.num_elements for entry in plan)
    for bits in (2.2, 3.0, 4.5):
        limit = CODE + int(bits * num_weights / 8)
        _, fitted = solver.solve(Budget(limit, CODE), {}, "mix")
        low, high = window(limit - CODE)
        assert fitted.note is None
        assert low <= fitted.num_bytes <= high, bits


def test_one_solver_for_all_limits_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one as soon as anything that it is made of is another."""
    monkeypatch.setattr(fill_file, "BudgetSolver", lambda *_: object())
    monkeypatch.setattr(fill_file, "_kept", {})
    weights = {"w": torch.arange(16.0).view(4, 4)}
    plans = [build_plan({"w": (4, 4)}, {"g": Grid(bits=bits)}, {"*": "g"}) for bits in (6, 5)]
    model = TrainedModel(LAPTOP, weights, plans[0], {}, is_on_grid=False)
    batches = [(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))]

    def solver(model: TrainedModel, batches=batches, precision: str = "fp32") -> object:
        return fill_file.solver_for(model, batches, precision, Console(quiet=True))

    kept = solver(model)
    assert solver(replace(model, weights={"w": weights["w"].clone()})) is kept
    for others in (
        (replace(model, weights={"w": weights["w"].nextafter(torch.tensor(99.0))}),),
        (replace(model, plan=plans[1]),),
        (replace(model, scales={"w": torch.ones(4, 1)}),),
        (replace(model, is_on_grid=True),),
        (replace(model, spec=replace(LAPTOP, num_heads=3)),),
        (model, [(batches[0][1], batches[0][1])]),
        (model, batches, "bf16"),
    ):
        assert solver(*others) is not kept
        kept = solver(model)


def test_the_measured_loss_is_that_of_the_file() -> None:
    spec = ModelSpec(64, 1, 32, 2, 2, 2, True)
    torch.manual_seed(0)
    gpt = GPT(spec)
    weights = {name: p.detach() for name, p in gpt.named_parameters()}
    for w in weights.values():  # what begins as zeros would hide all else
        w.add_(0.1 * torch.randn_like(w))
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    plan = build_plan(shapes, {"g": Grid(bits=6)}, {"*.weight": "g", "*": "fp32"})
    batches = [tuple(torch.randint(64, (2, 2, 16)).unbind())]
    solver = BudgetSolver(
        TrainedModel(spec, weights, plan, {}, False), batches, "fp32", Console(quiet=True)
    )
    for num_bytes in (4_000, 6_000):
        filled, _ = solver.solve(Budget(num_bytes, 0), {}, "zlib")
        measured = solver.measured_loss(filled)
        with torch.no_grad():
            before = float(gpt(*batches[0]))
            stored = filled.plan.snap(filled.weights, filled.scales)
            after = float(torch.func.functional_call(gpt, stored, batches[0]))
        assert measured == pytest.approx(after - before, abs=1e-6)
        assert abs(measured) > 1e-5


def test_what_takes_long_is_said_while_it_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(fill_file.log, "info", lambda line, *values: told.append(line % values))
    now = iter(range(0, 10_000, 2))
    monkeypatch.setattr(fill_file, "time", SimpleNamespace(monotonic=lambda: next(now)))
    solver = SimpleNamespace(console=Console(quiet=True))
    assert list(fill_file.BudgetSolver._track(solver, range(80), "sensitivities")) == [*range(80)]
    assert told == ["budget solver: sensitivities, about 20 s off the clock"]
    assert list(fill_file.BudgetSolver._track(solver, range(9), "candidates")) == [*range(9)]
    assert len(told) == 1
