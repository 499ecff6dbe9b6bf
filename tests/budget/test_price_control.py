"""qat=rd: ends at the limit, goes on after a kill, and is learned-step QAT where bits are free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from qat.artifact.container import read_artifact
from qat.errors import TrainingError
from qat.golf.bundle import count_code_bytes
from qat.training import checkpoint
from tests.conftest import Done, compiles, result_of
from tests.runs.test_resume import Crash, crash_in
from tests.test_torchrun import torchrun

RUNS = Path("logs/runs")
WEIGHTS = 77_824  # on the grid, of the tiny model


def limit(bits_per_weight: float) -> int:
    return count_code_bytes() + 3_000 + int(WEIGHTS * bits_per_weight / 8)


def share_of_limit(run: str, limit_bytes: int) -> float:
    return result_of(RUNS / run)["artifact_bytes"] / (limit_bytes - count_code_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_it_ends_at_the_limit(bits: int, train: Callable[..., Done]) -> None:
    done = train("qat=rd", f"limit_bytes={limit(bits)}", "max_steps=60", "run_name=r")
    assert done.code == 0, done.err
    assert 0.999 <= share_of_limit("r", limit(bits)) <= 1.0
    row = result_of(RUNS / "r")
    assert row["on_grid_share"] == 1.0
    assert row["val_bpb_snapped"] == pytest.approx(row["val_bpb_artifact"], abs=1e-12)
    assert row["grid"] == "int8_learned_bf16_columns"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_ten_seeds_and_three_limits(bits: int, seed: int, train: Callable[..., Done]) -> None:
    asked = ("qat=rd", f"limit_bytes={limit(bits)}", f"seed={seed}", "max_steps=80", "run_name=r")
    done = train(*asked)
    assert done.code == 0, done.err
    assert 0.999 <= share_of_limit("r", limit(bits)) <= 1.0


@pytest.mark.slow
def test_two_ranks_end_at_the_limit(tiny: list[str], tmp_path: Path) -> None:
    """Rank 0 encodes; the price moves alike on both."""
    asked = ("qat=rd", f"limit_bytes={limit(3)}", "max_steps=60", "run_name=two")
    done = torchrun(*tiny, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = result_of(tmp_path / RUNS / "two")
    assert 0.999 <= row["artifact_bytes"] / (limit(3) - count_code_bytes()) <= 1.0
    assert row["on_grid_share"] == 1.0


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_nothing_of_the_model_is_compiled_again(train: Callable[..., Done]) -> None:
    graphs = {}
    for qat in ("none", "rd"):
        torch._dynamo.reset()
        counters.clear()
        limited = () if qat == "none" else (f"limit_bytes={limit(3)}", "qat.start_step=12")
        with torch._dynamo.config.patch(error_on_recompile=True):
            done = train(f"qat={qat}", "compile=true", "max_steps=24", f"run_name={qat}", *limited)
        assert done.code == 0, done.err
        graphs[qat] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs["rd"] == graphs["none"] > 0


@pytest.mark.slow
def test_where_bits_are_free_it_is_learned_scale_qat(train: Callable[..., Done]) -> None:
    given = ("qat.start_step=5", "max_steps=12")
    assert train("qat=rd", "qat.bit_price=0", "run_name=free", *given).code == 0
    assert train("qat=rd", "qat.to_bytes=false", "run_name=plain", *given).code == 0
    free, plain = ((RUNS / name / "artifact.qat").read_bytes() for name in ("free", "plain"))
    assert free == plain


@pytest.mark.slow
def test_a_given_price_is_kept_and_bits_follow_it(train: Callable[..., Done]) -> None:
    sizes = []
    for price in ("1e-6", "1e-4"):
        asked = (f"qat.bit_price={price}", f"run_name=p{price}", "max_steps=30")
        assert train("qat=rd", *asked).code == 0
        sizes.append(result_of(RUNS / f"p{price}")["artifact_bytes"])
    assert sizes[0] > 1.3 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("at", [38, 19])
def test_it_goes_on_with_the_same_bits(
    at: int,
    train: Callable[..., Done],
    program: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QAT is on since step 33, and half-way from there a file is encoded."""
    given = ("qat=rd", f"limit_bytes={limit(3)}", "max_steps=40", "checkpoint.every_steps=19")
    assert train(*given, "run_name=whole").code == 0
    save = checkpoint.save_checkpoint
    writes = []

    def save_then_die(path: Path, state: dict) -> None:
        save(path, state)
        writes.append(path)
        if 19 * len(writes) == at:
            raise TrainingError("killed here")

    monkeypatch.setattr("qat.training.checkpoint.save_checkpoint", save_then_die)
    assert train(*given, "run_name=killed").code == 1
    monkeypatch.setattr("qat.training.checkpoint.save_checkpoint", save)
    assert program("train.py", f"resume={RUNS / 'killed'}").code == 0
    whole, killed = ((RUNS / n / "artifact.qat").read_bytes() for n in ("whole", "killed"))
    assert whole == killed


@pytest.mark.slow
def test_it_says_if_the_code_has_another_size_when_it_goes_on(
    train: Callable[..., Done], program: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("qat=rd", "qat.start_step=5", f"limit_bytes={limit(3)}", "max_steps=8")
    with monkeypatch.context() as patched:
        crash_in(patched, 3)
        with pytest.raises(Crash):
            train(*given, "checkpoint.every_steps=2", "run_name=r")
    monkeypatch.setattr("qat.golf.bundle.count_code_bytes", lambda: 12_345)
    done = program("train.py", f"resume={RUNS / 'r'}")
    assert done.code == 0, done.err
    assert " bytes and has 12345 now, so another part of limit_bytes is left" in done.err


def test_a_run_that_diverges_says_so(train: Callable[..., Done]) -> None:
    wild = ("qat=rd", f"limit_bytes={limit(3)}", "qat.start_step=2", "optimizer.matrix_lr=1e18")
    done = train(*wild, "optimizer.tied_embedding_lr=1e18", "max_steps=12")
    assert (done.code, done.err.count("error:")) == (1, 1), done.err
    assert "lower the learning rates" in done.err


def test_the_file_reads_back_what_training_saw(train: Callable[..., Done]) -> None:
    assert train("qat=rd", f"limit_bytes={limit(3)}", "max_steps=30", "run_name=r").code == 0
    artifact = read_artifact(RUNS / "r" / "artifact.qat")
    state = checkpoint.load_checkpoint(RUNS / "r" / "checkpoint.ckpt")
    assert state is not None
    snapped = artifact.plan.snap(state["weights"], state["learned_scales"])
    for name, weight in artifact.weights.items():
        assert torch.equal(weight, snapped[name]), name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("qat=int6", "qat.to_bytes=true"), "qat.to_bytes = true: takes learned scales"),
        (("qat=rd", "artifact.fill=true"), "artifact.fill = True: not with qat.to_bytes"),
        (("qat=rd", "qat.start_step=0"), "qat.start_step = 0: qat.to_bytes = true learns first"),
        (("qat=rd", "qat.start_step=1"), "qat.start_step = 1: qat.to_bytes = true learns first"),
        (
            ("qat=rd", "qat.start_lr_scale=1"),
            "qat.start_lr_scale = 1: qat.to_bytes = true learns",
        ),
        (("qat=rd", "averaging=ema"), "averaging = ema: not with qat.to_bytes"),
        (("qat=rd", "qat.bit_price=-1"), "qat.bit_price = -1: give 0 or more"),
    ],
)
def test_mistakes(asked: tuple[str, ...], message: str, train: Callable[..., Done]) -> None:
    done = train(*asked)
    assert (done.code, done.err.count("error:")) == (2, 1), done.err
    assert message in done.err
    assert not RUNS.exists()
