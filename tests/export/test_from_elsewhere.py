"""A Llama that somebody else trained, fine-tuned on a grid, as a file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.settings.schema import DataSettings
from qat.text.shards import TokenStream
from qat.text.source import from_settings
from tests.conftest import result_of

RUNS = Path("logs/runs")
SEQ_LEN = 64


def tokens_of(run: Path) -> TokenStream:
    settings = result_of(run)["settings"]
    source = from_settings(DataSettings(**settings["data"]), settings["model"]["vocab_size"])
    return TokenStream(source.train_files, "data.train_files")


@pytest.mark.slow
def test_from_float_to_a_gguf_file_that_is_better_than_rounding(
    finished: Path, program, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Trained by transformers and torch alone; then the same updates with QAT and without."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (dev)")
    pytest.importorskip("gguf", reason="needs gguf (dev)")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=192, tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimizer, stream = torch.optim.AdamW(model.parameters(), 3e-3), tokens_of(finished)
    losses = []
    for step in range(150):
        ids = torch.from_numpy(stream.take(step * 16 * SEQ_LEN, 16 * SEQ_LEN)).view(16, SEQ_LEN)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.save_pretrained(tmp_path / "hf")

    asked = (
        "profile=laptop", f"data.files=[{corpus}]", f"data.cache_dir={cache_dir}",
        "model.init_from=hf", f"seq_len={SEQ_LEN}", "batch_tokens=1024", "micro_batch_tokens=1024",
        "budget_seconds=null", "max_steps=40", "schedule.warmdown_steps=40", "precision=fp32",
        "optimizer.lr_scale=0.3",
    )  # fmt: skip
    int2 = ("grid=int2", "grid.group_size=32")
    ways = {"rounded": ("qat=none", *int2), "trained": ("qat=int2", int2[1], "qat.start_step=0")}
    for name, way in ways.items():
        done = program("train.py", *asked, *way, f"run_name={name}")
        assert done.code == 0, done.err
        done = program("eval.py", "task=export", f"run={name}", f"out={name}.gguf")
        assert done.code == 0, done.err
        assert "tensors, bit for bit" in done.out
    rounded, trained = (result_of(RUNS / name) for name in ways)
    assert trained["val_bpb_artifact"] < rounded["val_bpb_artifact"] - 0.02
    assert rounded["val_loss_float"] < losses[-1] + 0.5  # its weights did come from there
    assert rounded["train_loss"] < 0.8 * losses[0]
