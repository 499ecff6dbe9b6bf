"""benchmarks/train_step.py: its opponent trains as the challenge's own script did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qat.text.batches import BatchShape, micro_batch
from qat.text.shards import TokenStream
from tests.conftest import GOLF, ROOT

UPDATES = 20


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


@pytest.mark.slow
def test_the_opponent_has_the_recorded_losses() -> None:
    """In float32, from the weights that seed 1337 gives both."""
    from challenge_trainer import ChallengeTrainer

    from qat.model.gpt import GPT
    from qat.model.spec import ModelSpec

    torch.manual_seed(1337)
    start = GPT(ModelSpec(512, 3, 320, 5, 1, 3, False)).state_dict()
    sizes = (512, 3, 320, 5, 1, 3, False, 128)
    trainer = ChallengeTrainer(sizes, start, torch.device("cpu"), False, False)
    stream = TokenStream([GOLF / "fineweb_train_000000.bin"], "data.train_files")
    shape = BatchShape(2048, 128)
    recorded = json.loads((GOLF / "fp32_run.json").read_text())["train_losses"]
    for number in range(UPDATES):
        batch = micro_batch(stream, shape, number, 0, 0)
        loss = float(trainer.update([batch], 1, 1.0, 0.85 + 0.1 * number / 500))
        assert loss == pytest.approx(recorded[number], abs=1e-3), number


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_names_every_arm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import train_step

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(train_step, "ROOT", tmp_path)

    told = ["train_step.py", "tiny", "--steps", "1", "--turns", "1", "--micro-tokens", "8"]
    monkeypatch.setattr(sys, "argv", told)
    with pytest.raises(SystemExit):  # half a sequence
        train_step.main()
    assert "8 does not divide 16 into 16s" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", told[:-2])
    train_step.main()
    said = capsys.readouterr().out
    for arm in ("challenge", "challenge, keeping", "engine", "engine, int6", "bare loop"):
        assert f"\n{arm} " in said
    assert "apart" in said
