"""A Llama as Hugging Face's folder: opened by transformers it scores as here, and its tokenizer
cuts texts as SentencePiece does."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qat.artifact.container import read_artifact
from qat.evaluation.open_model import OpenedModel
from qat.export.hugging_face import write_folder
from qat.export.tokenizer_json import tokenizer_files
from qat.settings.schema import ModelSettings
from qat.text.corpus import web_bible
from qat.text.shards import TokenStream
from qat.text.tokenizer import Tokenizer
from qat.training.build import build_model
from qat.training.llama_config import spec_at, spec_of
from tests.conftest import GOLF, result_of
from tests.export.conftest import SPEC, untied

ODD = ["", " ", "  a  b ", "h\u00e9llo w\u00f6rld \u6f22\u5b57 \U0001f600\n\n\t x", "aaaaaaaaa",
       "e\u0301 \ufb01 \u00bd", "the end.\n", "\n\n\n", "light light", " \n the"]  # fmt: skip


def texts() -> list[str]:
    return [*ODD, *(text[:20_000] for text in islice(web_bible(), 0, 1000, 25))]


@pytest.mark.parametrize("which", ["made here", "the challenge's"])
def test_texts_are_cut_alike(which: str, tokenizer: Tokenizer) -> None:
    """Of the challenge's tokenizer characters are replaced and spaces dropped before."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs transformers (dev)")
    if which != "made here":
        tokenizer = Tokenizer(GOLF / "tokenizer.model")
    files, fault = tokenizer_files(tokenizer, 32)
    assert fault is None
    theirs = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    for text in texts():
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode_document(text), text[:80]
        assert theirs.decode(ids) == tokenizer.decode(ids)


@pytest.mark.slow
def test_transformers_opens_it_and_it_scores_the_same(
    train, program, cache_dir: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (dev)")
    assert train("model=llama_4x288", "model.num_layers=2", "model.dim=64", "model.num_heads=4",
                 "model.num_kv_heads=2", "qat=int4", "qat.start_step=4", "run_name=r",
                 "eval.max_tokens=null").code == 0  # fmt: skip
    done = program("eval.py", "task=export", "run=r", "out=DIR.v1/")
    assert done.code == 0, done.err
    run, folder = Path("logs/runs/r"), Path("DIR.v1")
    artifact = read_artifact(run / "artifact.qat")
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    state = model.state_dict()
    for name, w in artifact.weights.items():
        assert torch.equal(state[name].view(torch.int32), w.view(torch.int32)), name

    shards = cache_dir / artifact.meta["data"]["cache_key"]
    stream = TokenStream(sorted(shards.glob("val_*.bin")), "")
    windows = (len(stream) - 1) // 32
    ids = torch.from_numpy(np.asarray(stream.take(0, 32 * windows + 1), np.int64))
    with torch.inference_mode():
        nats = [
            F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="none").double()
            for x, y in zip(
                ids[:-1].view(-1, 32).split(64), ids[1:].view(-1, 32).split(64), strict=True
            )
        ]
    expected = result_of(run)["val_loss_artifact"]
    assert float(torch.cat(nats).mean()) == pytest.approx(expected, abs=1e-5)

    cut = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    for text in (*ODD, "The light of day. " * 9):
        assert cut(text)["input_ids"] == tokenizer.encode_document(text)
    assert model.generation_config.eos_token_id == cut.eos_token_id == tokenizer.bos_id

    model.save_pretrained("again")
    spec = spec_at(Path("again"))
    assert spec is not None
    back = build_model(ModelSettings(**vars(spec), init_from="again"), 1).state_dict()
    for name, w in artifact.weights.items():
        assert torch.equal(back[name].view(torch.int32), w.view(torch.int32)), name


def test_its_config_is_the_spec_again(
    stored: Callable[..., OpenedModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    spec = untied()
    write_folder(tmp_path / "hf", stored(spec), tokenizer)
    found = spec_of(json.loads((tmp_path / "hf/config.json").read_text()))
    more = {"mlp_dim": 128, "rope_base": 10_000.0, "norm_eps": 1e-6}
    assert found.more == more
    assert (found.dim, found.num_kv_heads, found.tie_embeddings) == (64, 2, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.qat", "hf"]


CONFIG = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_configs_of_older_versions() -> None:
    spec = spec_of(CONFIG | {"rope_theta": 5e5, "rms_norm_eps": 1e-5})
    assert (spec.num_kv_heads, spec.tie_embeddings) == (4, False)
    assert spec.more == {"mlp_dim": 128, "rope_base": 5e5, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistral"}, "its model_type is 'mistral', and this Llama's llama"),
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ({"attention_bias": True}, "its attention_bias is True"),
        ({"rope_scaling": {"factor": 2}}, "its rope_scaling is"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
        ({"head_dim": 32}, "its head_dim is 32, and this Llama's 64 / 4"),
        ({"quantization_config": {"bits": 4}}, "its quantization_config is"),
        ({"hidden_size": -64}, "its model has a size that is none"),
        ({"intermediate_size": "many"}, "its model has a size that is none"),
    ],
    ids=str,
)
def test_what_this_llama_is_not(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        spec_of(CONFIG | changes)


def test_a_vocabulary_that_is_no_bpe_is_copied(
    stored: Callable[..., OpenedModel], tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("qat.text.piece_table.BPE", 3)
    said = write_folder(tmp_path / "hf", stored(SPEC), tokenizer)
    assert said[-1] == "tokenizer      tokenizer.model alone: its pieces are not joined by BPE"
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.model"}  # fmt: skip
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
