"""A forked run has the bits of the same run in one piece; what cannot be forked is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qat.golf import bundle
from qat.quantize.gradients import rule_kinds
from qat.runs.fork import Course
from qat.runs.run_folder import METRICS, kept_steps, read_config, read_metrics
from qat.settings.schema import from_yaml
from qat.training.schedule import OBSERVED_STEPS
from tests.conftest import result_of

RUNS = Path("logs/runs")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)["weights"]


def same_run(one: Path, other: Path) -> bool:
    """To the last bit: masters, file and the losses of all updates."""
    ours, theirs = weights_of(one), weights_of(other)
    losses = [
        [row["train_loss"] for row in read_metrics(folder / METRICS)] for folder in (one, other)
    ]
    files = [(folder / "artifact.qat").read_bytes() for folder in (one, other)]
    return (
        all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        and losses[0] == losses[1]
        and files[0] == files[1]
    )


def settings_of(name: str):
    return from_yaml(read_config(RUNS / name)[0], "resume")


def fork_is_whole(train, arm: tuple[str, ...], step: int, common: tuple[str, ...] = ()) -> None:
    trunk = train("qat=none", "run_name=trunk", f"fork.keep_steps=[2,{step}]", *common)
    assert trunk.code == 0, trunk.err
    assert kept_steps(RUNS / "trunk") == [2, step]
    whole = train(*common, *arm, "run_name=whole")
    assert whole.code == 0, whole.err
    assert Course.of(settings_of("trunk")).shared(Course.of(settings_of("whole"))) == step
    forked = train(*common, *arm, "run_name=forked", "fork.run=trunk", f"fork.step={step}")
    assert forked.code == 0, forked.err
    assert same_run(RUNS / "whole", RUNS / "forked")
    row = result_of(RUNS / "forked")
    assert (row["forked_from"], row["forked_steps"]) == ("trunk", step)
    assert row["steps"] == result_of(RUNS / "whole")["steps"]


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(
            ("qat=int4", "averaging=ema", "averaging.start_fraction=0.6", "qat.ramp_steps=2"),
            marks=pytest.mark.slow,
        ),
        ("qat=lsq4", "optimizer.learned_scale_lr=0.01", "schedule.qat_update_price=1.3"),
    ],
    ids=" ".join,
)
def test_a_forked_run_has_the_bits_of_one_piece(train, arm: tuple[str, ...]) -> None:
    fork_is_whole(train, (*arm, "qat.start_step=6"), 6)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", sorted(set(rule_kinds()) - {"learned"}))
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_with_every_gradient_rule(train, gradient: str, optimizer: str) -> None:
    arm = ("qat=int4", f"qat.gradient={gradient}", "qat.start_step=6", "qat.stop_step=9")
    fork_is_whole(train, arm, 6, (f"optimizer={optimizer}",))


@pytest.mark.slow
def test_trained_to_bytes(train) -> None:
    """Its last updates before the switch are observed, so they are its own."""
    arm = ("qat=rd", "limit_bytes=300000", "qat.start_step=70")
    fork_is_whole(train, arm, 70 - OBSERVED_STEPS, ("max_steps=80",))


@pytest.mark.slow
def test_trained_to_bytes_beside_other_code(train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code leaves to the file is another, so the updates after the switch are."""
    arm = ("qat=rd", "limit_bytes=300000", "qat.start_step=3")
    assert train(*arm, "run_name=trunk", "fork.keep_steps=[3,6]").code == 0
    counted = bundle.count_code_bytes()
    monkeypatch.setattr(bundle, "count_code_bytes", lambda: counted + 1)
    done = train(*arm, "run_name=tail", "fork.run=trunk", "fork.step=6")
    assert done.code == 2
    assert f"trained to bytes beside {counted} bytes of code" in done.err
    assert "fork at step 3 or before" in done.err
    assert train(*arm, "run_name=tail", "fork.run=trunk", "fork.step=3").code == 0


@pytest.mark.slow
def test_a_fork_of_a_fork_resumes_to_the_same_bits(train, program) -> None:
    assert train("qat=none", "run_name=trunk", "fork.keep_steps=[4]").code == 0
    ema = ("averaging=ema", "averaging.start_fraction=0.8")
    assert train("qat=int4", "qat.start_step=4", *ema, "run_name=whole").code == 0
    first = ("qat=int4", "qat.start_step=4", "run_name=branch", "fork.run=trunk", "fork.step=4")
    assert train(*first, "fork.keep_steps=[8]").code == 0
    twig = ("qat=int4", "qat.start_step=4", *ema, "run_name=twig", "fork.run=branch")
    assert train(*twig, "fork.step=8", "checkpoint.every_steps=1").code == 0
    assert same_run(RUNS / "whole", RUNS / "twig")
    # Killed before its first checkpoint it goes on from the fork.
    folder = RUNS / "twig"
    (folder / "result.json").unlink()
    (folder / "checkpoint.ckpt").unlink()
    assert program("train.py", "resume=twig").code == 0
    assert same_run(RUNS / "whole", folder)
    (RUNS / "branch" / "kept" / "8.ckpt").write_bytes(b"PK")
    done = train(*(word.replace("twig", "late") for word in twig), "fork.step=8")
    assert done.code == 2
    assert "fork.step=8: logs/runs/branch/kept/8.ckpt is damaged; run that one again" in done.err
    # With a checkpoint of its own it needs the fork no more.
    (folder / "result.json").unlink()
    shutil.rmtree(RUNS / "branch" / "kept")
    assert program("train.py", "resume=twig").code == 0
    assert result_of(folder)["forked_from"] == "branch"


def test_what_cannot_be_forked_is_refused(train) -> None:
    assert train("qat=none", "run_name=trunk", "fork.keep_steps=[2,6]").code == 0
    for asked, said in (
        (("qat=int4", "qat.start_step=3", "fork.step=6"), "the two runs share 3 updates"),
        (("seed=2", "fork.step=6"), "that run has another seed"),
        (("qat=int4", "fork.step=5"), "no checkpoint was kept there (kept: 2, 6)"),
        (("fork.step=6", "budget_seconds=9"), "not with a clock"),
    ):
        done = train(*asked, "fork.run=trunk", "run_name=tail")
        assert done.code == 2, asked
        assert said in done.err
        assert "fork.run=trunk fork.step=" in done.err
        assert not (RUNS / "tail").exists()


def test_half_a_fork_is_refused(train) -> None:
    done = train("fork.run=trunk")
    assert (done.code, "fork.step = null: give fork.run=RUN and fork.step=N" in done.err) == (
        2,
        True,
    )
