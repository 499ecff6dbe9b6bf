"""Training as the programs do it: the baseline's curve, priming, the switch, one model graph."""

from __future__ import annotations

import csv
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from qat.artifact.container import read_artifact
from qat.compiled import forget
from qat.errors import TrainingError, UserError
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.qat_model import QatModel, weights_seen
from qat.quantize.gradients import Seen, rule_kinds
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.quantize.rounding import encode, snap
from qat.runs.store_again import stored_tensors
from qat.settings.schema import ModelSettings, OptimizerSettings
from qat.text.batches import BatchShape, TrainingBatches
from qat.text.shards import TokenStream
from qat.training.build import build_model, spec_of
from qat.training.clock import TrainingClock
from qat.training.distill import Distillation
from qat.training.fit import build_trainer
from qat.training.liveness import LivenessProof
from qat.training.loop import Pace, TrainingLoop, compiled_loss
from qat.training.schedule import Schedule
from tests.conftest import GOLF, Done, compiles, result_of

RUNS = Path("logs/runs")
INT4 = Grid(bits=4)


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_baselines_loss_curve(program) -> None:
    """From the baseline's initial weights, on its tokens, with its schedule: its losses."""
    done = program(
        "train.py", "profile=laptop", "seed=1337", "run_name=curve",
        f"data.train_files={GOLF}/fineweb_train_*.bin", f"data.val_files={GOLF}/fineweb_val_*.bin",
        f"data.tokenizer={GOLF}/tokenizer.model", "model.num_layers=3", "model.dim=320",
        "model.num_heads=5", "model.num_kv_heads=1", "model.mlp_mult=3", "model.vocab_size=512",
        "model.tie_embeddings=false", "seq_len=128", "batch_tokens=2048", "precision=fp32",
        "budget_seconds=null", "max_steps=60", "schedule.warmdown_steps=30",
        "schedule.warmup_steps=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    reference = json.loads((GOLF / "fp32_run.json").read_text())
    ours = [float(row["train_loss"]) for row in metrics(RUNS / "curve")]
    off = [abs(a - b) for a, b in zip(ours, reference["train_losses"], strict=True)]
    assert max(off[:20]) < 1e-3
    assert max(off) < 1e-2
    result = result_of(RUNS / "curve")
    assert result["val_bpb_float"] == pytest.approx(reference["val_bpb"], abs=0.005)


@pytest.mark.slow
def test_every_optimizer_learns(train) -> None:
    """More than the frequencies of the tokens, which a step or two give."""
    for name in ("muon", "normuon", "adamw"):
        assert train(f"optimizer={name}", "max_steps=40", f"run_name={name}").code == 0
        losses = [float(row["train_loss"]) for row in metrics(RUNS / name)]
        assert losses[-1] < 0.75 * losses[0], name
    first = {metrics(RUNS / name)[1]["train_loss"] for name in ("muon", "normuon", "adamw")}
    assert len(first) == 3


@pytest.mark.slow
def test_weight_decay_is_decoupled_and_only_of_the_matrices(train) -> None:
    asked = ["max_steps=1", "optimizer.matrix_lr=0.5", "schedule.warmdown_steps=0"]
    masters = {}
    for decay in (0.0, 0.5):
        for name in ("muon", "adamw"):
            overrides = [*asked, f"optimizer.name={name}", f"optimizer.weight_decay={decay}"]
            assert train(*overrides, f"run_name={name}{decay}").code == 0
            path = RUNS / f"{name}{decay}" / "checkpoint.ckpt"
            masters[name, decay] = stored_tensors(path)[0]
    torch.manual_seed(1337)
    start = dict(GPT(ModelSpec(320, 2, 64, 4, 2, 2, True)).named_parameters())
    for name in ("muon", "adamw"):
        for key, w in masters[name, 0.0].items():
            shrunk = 0.25 * start[key].detach() if "weight" in key and "blocks" in key else 0.0
            torch.testing.assert_close(masters[name, 0.5][key], w - shrunk, msg=key)


def test_start_step_counts_updates(train) -> None:
    assert train("qat=int6", "qat.start_step=5", "run_name=a").code == 0
    result = result_of(RUNS / "a")
    assert (result["qat_first_step"], result["qat_steps"]) == (6, 7)
    assert [int(row["qat_on"]) for row in metrics(RUNS / "a")] == [0] * 5 + [1] * 7
    assert result["on_grid_share"] == 1.0
    assert result["steps"] == 12
    assert result["tokens"] == 12 * 256


@pytest.mark.slow
def test_always_on_by_fraction_and_the_default(train) -> None:
    train("qat=int4", "qat.start_step=0", "run_name=always")
    assert result_of(RUNS / "always")["qat_steps"] == 12
    train("qat=int4", "qat.start_fraction=0.75", "run_name=late")
    assert result_of(RUNS / "late")["qat_first_step"] == 10
    train("qat=int4", "run_name=default")
    assert result_of(RUNS / "default")["qat_first_step"] == 7


@pytest.mark.parametrize(
    "start", ["start_step=6000", "start_step=12", "start_fraction=1.0", "start_lr_scale=0.2"]
)
def test_a_start_out_of_reach_is_said_loudly_and_marked(start: str, train) -> None:
    done = train("qat=int8", f"qat.{start}", "run_name=never")
    assert done.code == 0
    assert "QAT WILL NEVER START" in done.err
    assert "qat.start_fraction" in done.err
    result = result_of(RUNS / "never")
    assert result["qat_never_started"] is True
    assert result["qat_steps"] == 0
    assert result["qat_first_step"] is None
    assert result["on_grid_share"] < 1.0


def test_float_steps_before_the_switch_are_the_baselines(train) -> None:
    """The same losses bit for bit until the switch, others after it."""
    train("qat=none", "run_name=none")
    train("qat=int4", "qat.start_step=6", "run_name=qat")
    none = [row["train_loss"] for row in metrics(RUNS / "none")]
    qat = [row["train_loss"] for row in metrics(RUNS / "qat")]
    assert none[:6] == qat[:6]
    assert none[6] != qat[6]


@pytest.mark.slow
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_priming_leaves_no_trace(train, warmup_steps: int) -> None:
    train("qat=int6", "qat.start_step=6", f"schedule.warmup_steps={warmup_steps}", "run_name=p")
    train("qat=int6", "qat.start_step=6", "schedule.warmup_steps=2", "run_name=q")
    assert [r["train_loss"] for r in metrics(RUNS / "p")] == [
        r["train_loss"] for r in metrics(RUNS / "q")
    ]
    a, b = (RUNS / name / "artifact.qat" for name in "pq")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "gradient",
    ["lotion", *(pytest.param(g, marks=pytest.mark.slow) for g in ("cage", "dampen", "freeze"))],
)
def test_priming_leaves_no_trace_in_a_rule(train, gradient: str) -> None:
    """One that remembers, or does something beside the loss."""
    for warmup_steps in (0, 2):
        rule = f"qat.gradient={gradient}", f"schedule.warmup_steps={warmup_steps}"
        done = train("qat=int4", *rule, "qat.start_step=4", f"run_name=after_{warmup_steps}")
        assert done.code == 0, done.err
    a, b = (RUNS / f"after_{steps}" / "artifact.qat" for steps in (0, 2))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_micro_batches_change_nothing_but_rounding(train) -> None:
    train("run_name=whole")
    train("micro_batch_tokens=64", "run_name=pieces")
    whole = [float(r["train_loss"]) for r in metrics(RUNS / "whole")]
    pieces = [float(r["train_loss"]) for r in metrics(RUNS / "pieces")]
    assert whole == pytest.approx(pieces, abs=1e-3)


@pytest.mark.slow
def test_the_clock_ends_the_run_within_one_step(train) -> None:
    done = train("budget_seconds=1.5", "max_steps=null", "run_name=clock")
    assert done.code == 0, done.err
    times = [float(row["elapsed_seconds"]) for row in metrics(RUNS / "clock")]
    assert times == sorted(times)
    assert times[-1] >= 1.5
    assert times[-2] < 1.5


def test_a_loss_that_is_not_finite_stops_the_run(train) -> None:
    done = train("optimizer.tied_embedding_lr=1e30", "run_name=nan", "logger.every_steps=1")
    assert done.code == 1
    assert "lower learning rates" in done.err
    assert result_of(RUNS / "nan")["status"] == "failed"
    assert not list((RUNS / "nan").glob("*artifact*"))


def test_weights_that_diverged_are_not_the_users_mistake(train) -> None:
    """The last update throws the embedding's steps beyond fp16: found at export."""
    done = train("optimizer.tied_embedding_lr=1e9", "max_steps=1", "run_name=far")
    assert done.code == 1
    assert "lower the learning rates" in done.err
    assert result_of(RUNS / "far")["status"] == "failed"


def module(
    compile_model: bool,
    start_step: int | None,
    max_steps: int,
    grid: Grid = INT4,
    distilled: bool = False,
) -> TrainingLoop:
    torch.manual_seed(0)
    spec = ModelSpec(512, 2, 32, 4, 2, 2, True)
    gpt = GPT(spec)
    shapes = {name: tuple(p.shape) for name, p in gpt.named_parameters()}
    plan = build_plan(shapes, {"grid": grid}, {"*.weight": "grid", "*": "fp16"})
    schedule = Schedule(None, max_steps, 2, 0.85, 0.95, 500, start_step)
    pace = Pace(log_every_steps=1)
    loss = compiled_loss(spec) if compile_model else None
    model, settings = QatModel(gpt, plan, fused=compile_model), OptimizerSettings()
    if not distilled:
        return TrainingLoop(model, schedule, settings, pace, [LivenessProof()], loss)
    teacher = Distillation(0.5, 2.0, gpt, spec if compile_model else None)
    return TrainingLoop(
        model, schedule, settings, pace, [LivenessProof(), teacher], loss, teacher.loss
    )


def proof_of(loop: TrainingLoop) -> LivenessProof:
    proof = loop.hooks[0]
    assert isinstance(proof, LivenessProof)
    return proof


def fit(module: TrainingLoop) -> None:
    stream = TokenStream([GOLF / "fineweb_train_000000.bin"], "data.train_files")
    batches = TrainingBatches(stream, BatchShape(256, 32), 0, 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    build_trainer([], []).fit(module, loader)


# What is captured, and what makes it be captured again, is the same whatever compiles it: C++ in
# half a minute, or nothing.
@compiles
@pytest.mark.parametrize(
    ("backend", "distilled"),
    [("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_one_model_graph_before_and_after_the_switch(
    backend: str, distilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 3 in the real training loop: Lightning, compiled model, switch at step 3."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    forget()
    counters.clear()
    under_test = module(True, start_step=3, max_steps=6, distilled=distilled)
    at_first_update = []
    under_test.hooks[0].at_switch = lambda loop: at_first_update.append(  # type: ignore[method-assign]
        counters["stats"]["unique_graphs"]
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        fit(under_test)
    assert under_test.progress.qat_steps == 3
    # The model, and on a CPU the pass of the snap; on CUDA that is Triton's. With a
    # teacher, its logits and the loss with them.
    graphs = (1 if torch.cuda.is_available() else 2) + (2 if distilled else 0)
    assert counters["stats"]["unique_graphs"] == graphs
    assert at_first_update == [graphs]
    assert proof_of(under_test).on_grid_share == 1.0
    with torch._dynamo.config.patch(error_on_recompile=True):
        fit(module(True, start_step=3, max_steps=6, distilled=distilled))
    # The next run of a sweep compiles nothing.
    assert counters["stats"]["unique_graphs"] == graphs
    forget()


def test_masters_stay_off_the_grid_while_the_model_sees_it() -> None:
    under_test = module(compile_model=False, start_step=0, max_steps=4)
    fit(under_test)
    ids = torch.zeros(1, 8, dtype=torch.long)
    # Lightning has taken the masters back to the CPU; what was seen stays where it was.
    given = {n: w.cpu() for n, w in under_test.switch.weights(under_test.masters).items()}
    seen = weights_seen(under_test.model.model, given, ids)
    assert set(seen) == set(under_test.masters)
    stored = under_test.switch.plan.snap(under_test.masters)
    for name, w in seen.items():
        assert torch.equal(w, stored[name]), name
    assert not torch.equal(under_test.masters["tok_emb.weight"], stored["tok_emb.weight"])
    assert proof_of(under_test).on_grid_share == 1.0


def test_liveness_sees_a_snapped_copy_that_is_not_used() -> None:
    """The planted fault: one matrix of the forward pass is the master after all."""
    under_test = module(compile_model=False, start_step=0, max_steps=2)
    weights = under_test.switch.weights
    name = "blocks.1.mlp.fc.weight"
    under_test.switch.weights = lambda masters: weights(masters) | {name: masters[name]}  # type: ignore[method-assign]
    fit(under_test)
    assert proof_of(under_test).on_grid_share < 0.95


def test_the_clock_stands_still_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TrainingClock(already_seconds=5.0)
    clock.start()
    now[0] += 2.0
    assert clock.agree() == 7.0
    clock.pause()
    now[0] += 50.0
    assert clock.agree() == 7.0
    clock.start()
    now[0] += 1.0
    assert clock.agree() == 8.0


@pytest.mark.slow
def test_initial_weights_from_a_file(train, tmp_path: Path) -> None:
    torch.manual_seed(7)
    gpt = GPT(ModelSpec(320, 2, 64, 4, 2, 2, True))
    torch.save(gpt.state_dict(), tmp_path / "init.pt")
    assert train("model.init_from=init.pt", "max_steps=1", "run_name=from").code == 0
    assert train("seed=7", "max_steps=1", "run_name=seed").code == 0
    a, b = (result_of(RUNS / name)["train_loss"] for name in ("from", "seed"))
    assert a == b
    torch.save({"weights": [1]}, tmp_path / "bad.pt")
    done: Done = train("model.init_from=bad.pt")
    assert done.code == 2
    assert "model.init_from=bad.pt" in done.err


def test_why_initial_weights_are_refused(tmp_path: Path) -> None:
    model = ModelSettings(320, 2, 64, 4, 2, 2, init_from=str(tmp_path / "bad.pt"))
    good = GPT(spec_of(model)).state_dict()
    name = "blocks.0.attn.c_q.weight"
    for saved, reason in (
        (good | {name: good[name][:9]}, f"{name} is (9, 64), in the model (64, 64)"),
        (good | {name: good[name] * torch.nan}, f"{name} is not finite"),
        ({key: w for key, w in good.items() if key != name}, f"it has no {name}"),
        (good | {"more": good[name]}, "the model has no more"),
        ({"net": good}, "not a dict of name -> tensor"),
        ({"model": Path("x")}, "it holds more than tensors, or is no torch file"),
        (None, "No such file or directory"),
    ):
        (tmp_path / "bad.pt").unlink(missing_ok=True)
        if saved is not None:
            torch.save(saved, tmp_path / "bad.pt")
        with pytest.raises(UserError) as caught:
            build_model(model, 1)
        assert str(caught.value).endswith(f"bad.pt: not weights of this model ({reason})")


def test_a_weight_that_bypasses_its_snapped_copy_is_an_error() -> None:
    """The planted fault: a bank that the forward pass reads from elsewhere."""
    under_test = module(compile_model=False, start_step=0, max_steps=2)
    mlp = under_test.model.model.blocks[0].mlp
    bank = mlp.fc.weight.detach().clone()
    mlp.forward = lambda x: mlp.proj(torch.relu(x @ bank.T).square())  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"blocks\.0\.mlp\.fc\.weight"):
        fit(under_test)


def test_a_weight_that_is_not_a_number_is_called_so() -> None:
    under_test = module(compile_model=False, start_step=0, max_steps=2)
    with torch.no_grad():
        under_test.masters["blocks.0.mlp.fc.weight"][0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"fc\.weight is not finite before the first step"):
        fit(under_test)


FAULTS = {
    "embedding skipped": lambda seen, masters: {"tok_emb.weight": masters["tok_emb.weight"]},
    "negative weights zeroed": lambda seen, masters: {n: w.clamp_min(0) for n, w in seen.items()},
    "rounded twice": lambda seen, masters: {n: snap(w, Grid(bits=3)) for n, w in seen.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_liveness_sees_weights_that_are_not_the_files(fault: str) -> None:
    under_test = module(compile_model=False, start_step=0, max_steps=3)
    weights = under_test.switch.weights

    def faulty(masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen = weights(masters)
        return seen | FAULTS[fault](seen, masters)

    under_test.switch.weights = faulty  # type: ignore[method-assign]
    fit(under_test)
    assert proof_of(under_test).on_grid_share < 0.95


def test_liveness_sees_a_scale_frozen_at_the_first_forward() -> None:
    under_test = module(compile_model=False, start_step=0, max_steps=6)
    steps: dict[str, torch.Tensor] = {}

    def frozen(entry, w: torch.Tensor, step: int, progress: float) -> Seen:
        if entry.grid is None:
            return Seen(entry.snap(w))
        steps.setdefault(entry.name, encode(w, entry.grid).scales)
        return Seen(snap(w, entry.grid, steps[entry.name].float()))

    under_test.switch._see = frozen  # type: ignore[method-assign]
    fit(under_test)
    assert proof_of(under_test).on_grid_share < 0.95


def test_a_graph_that_folded_its_first_weights_is_an_error() -> None:
    """The planted fault: a flag read when the graph was made, so that it keeps using masters."""
    under_test = module(compile_model=False, start_step=2, max_steps=4)
    under_test.loss = lambda weights, *batch: under_test._loss(under_test.masters, *batch)
    with pytest.raises(TrainingError, match="does not come from the weight handed to it"):
        fit(under_test)


def with_slope(under_test: TrainingLoop, slope_of) -> TrainingLoop:
    """The module with gradients to its grid-planned masters multiplied by slope_of(master)."""
    see = under_test.switch._see

    def scaled(entry, w: torch.Tensor, step: int, progress: float) -> Seen:
        seen = see(entry, w, step, progress)
        return seen if entry.grid is None else seen._replace(slope=slope_of(w))

    under_test.switch._see = scaled  # type: ignore[method-assign]
    return under_test


def test_liveness_sees_gradients_that_are_all_zero() -> None:
    """As of fp8 gradients without scaling: nothing is left of them."""
    healthy = module(compile_model=False, start_step=0, max_steps=3)
    dead = with_slope(module(compile_model=False, start_step=0, max_steps=3), torch.zeros_like)
    for under_test in (healthy, dead):
        fit(under_test)
    assert proof_of(healthy).gradients.nonzero_share > 0.9
    assert proof_of(healthy).gradients.movable_share > 0.9
    assert proof_of(healthy).gradients.dead == []
    assert proof_of(dead).gradients.nonzero_share == 0.0
    assert len(proof_of(dead).gradients.dead) == len(dead.switch.plan.on_grid)
    assert healthy.progress.qat_last_step == 3


def test_liveness_sees_rows_whose_largest_weight_can_never_move() -> None:
    """As of a clip below max|w| whose gradient is zero outside: nearly all gradients are there."""
    stuck = with_slope(
        module(compile_model=False, start_step=0, max_steps=3),
        lambda w: ((w == 0) | (w.abs() < w.abs().amax(1, keepdim=True))).float(),
    )
    fit(stuck)
    assert proof_of(stuck).gradients.nonzero_share > 0.8
    assert proof_of(stuck).gradients.movable_share < 0.1


def test_stop_step_ends_qat(train) -> None:
    assert train("qat=int4", "qat.start_step=3", "qat.stop_step=8", "run_name=s").code == 0
    result = result_of(RUNS / "s")
    assert (result["qat_first_step"], result["qat_last_step"], result["qat_steps"]) == (4, 8, 5)
    assert result["on_grid_share"] == 1.0
    assert [int(row["qat_on"]) for row in metrics(RUNS / "s")] == [0] * 3 + [1] * 5 + [0] * 4


@pytest.mark.parametrize("stop", [11, 12, 13])
def test_liveness_describes_the_last_qat_update_whenever_it_was(train, stop: int) -> None:
    assert train("qat=int4", "qat.start_step=3", f"qat.stop_step={stop}", "run_name=s").code == 0
    result = result_of(RUNS / "s")
    assert result["qat_last_step"] == min(stop, 12)
    assert result["on_grid_share"] == 1.0
    assert result["nonzero_gradient_share"] > 0.5


def test_learned_scales_are_found_anew_after_qat_stopped(train) -> None:
    """They stood still while the weights moved on: the file takes the rule's steps instead."""
    assert train("qat=lsq4", "qat.start_step=2", "qat.stop_step=4", "run_name=s").code == 0
    artifact = read_artifact(RUNS / "s" / "artifact.qat")
    masters = stored_tensors(RUNS / "s" / "checkpoint.ckpt")[0]
    for name, w in artifact.plan.snap(masters).items():
        assert torch.equal(w, artifact.weights[name]), name


def test_start_by_learning_rate(train) -> None:
    """Rates fall over the last 4 of 12 updates: 1, .75, .5, .25."""
    assert train("qat=int4", "qat.start_lr_scale=0.5", "run_name=s").code == 0
    assert result_of(RUNS / "s")["qat_first_step"] == 11


@pytest.mark.slow
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_cold_step_does_not_foretell_the_others(train, warmup_steps: int, monkeypatch) -> None:
    """With no warm priming step the estimate waits for real ones."""
    estimates = []
    monkeypatch.setattr(
        "qat.training.fit.forecast", lambda s, seconds, *_: estimates.append(seconds)
    )
    original = TrainingLoop._update

    def slow_at_first(self: TrainingLoop) -> None:
        if not hasattr(self, "_was_slow"):
            self._was_slow = True
            time.sleep(1.0)
        original(self)

    monkeypatch.setattr(TrainingLoop, "_update", slow_at_first)
    assert train(f"schedule.warmup_steps={warmup_steps}", "run_name=s").code == 0
    assert len(estimates) == 1
    assert estimates[0] < 1.0 or warmup_steps == 0


def test_learned_scales_learn_and_stay_out_of_muon() -> None:
    lsq = Grid(bits=4, scale_rule="learned", scale_floor=1e-3)
    under_test = module(compile_model=False, start_step=1, max_steps=4, grid=lsq)
    fit(under_test)
    steps = under_test.switch.learned_scales
    assert set(steps) == {e.name for e in under_test.switch.plan.on_grid}
    fresh = under_test.switch.plan.encode(under_test.masters)
    found = {item.entry.name: item.floats[0].float() for item in fresh if item.coded is not None}
    assert any(not torch.equal(steps[name].half().float(), found[name]) for name in steps)
    assert proof_of(under_test).on_grid_share == 1.0


NEAR_THE_GRID = {"soft_round", "noise", "lotion", "parq"}  # see other weights than it has
QUICK = ("clipped", "soft_round", "cage")


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=() if rule in QUICK else pytest.mark.slow)
        for rule in sorted(set(rule_kinds()) - {"identity", "learned"})
    ],
)
def test_every_gradient_rule_trains(rule: str, train) -> None:
    done = train("qat=int4", f"qat.gradient={rule}", "qat.start_step=3", "run_name=g")
    assert done.code == 0, done.err
    result = result_of(RUNS / "g")
    assert result["qat_steps"] == 9
    if rule not in NEAR_THE_GRID:
        assert result["on_grid_share"] == 1.0
    assert abs(result["val_bpb_snapped"] - result["val_bpb_artifact"]) < 1e-9
