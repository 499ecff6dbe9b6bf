"""Exported files in llama.cpp itself, by its wheel ``xllamacpp``, in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.evaluation.open_model import OpenedModel, open_artifact, open_validation
from qat.export.gguf_file import write_gguf
from qat.model.registry import model_of
from qat.settings.schema import DataSettings
from qat.text.corpus import web_bible
from qat.text.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.export.conftest import OF_GGUF, RULES, SPEC, named, untied

pytest.importorskip("gguf", reason="needs gguf (export)")
xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp (dev): llama.cpp itself")

PROMPT = "the light of the day"
CONTEXT = 128
NEW_TOKENS = 64


def continued(path: Path, prompt: str = PROMPT, num_probs: int = 0) -> dict[str, Any]:
    """Greedily, sums and keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = CONTEXT, 1, -1
    params.cpuparams.n_threads, params.warmup, params.fit_params = 1, False, False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0.0, "n_probs": num_probs}
    return xllamacpp.Server(params).handle_completions(asked)["choices"][0]


def log_probabilities(found: dict[str, Any], vocab_size: int) -> tuple[list[int], Tensor]:
    """(tokens, log-probabilities (tokens, V) that they were the likeliest of)."""
    steps = found["logprobs"]["content"]
    table = torch.full((len(steps), vocab_size), torch.nan)
    for row, step in zip(table, steps, strict=True):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    assert not table.isnan().any()
    return [step["id"] for step in steps], table


def product_in_8_bits(x: Tensor, w: Tensor, minima: Tensor | None) -> Tensor:
    """Of activations as ggml's products take them: whole numbers by a float16 scale per 32. What
    the minima of blocks (rows, blocks) are multiplied with is the sum of these numbers by the scale
    before it was rounded, as float16."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, blocks / scale, 0.0).round()
    rounded = levels * scale.half().float()
    found = F.linear(rounded.flatten(-2), w)
    if minima is None:
        return found
    sums = (levels * scale).sum(-1).half().float()
    return found + F.linear(sums - rounded.sum(-1), minima.float())


@torch.inference_mode()
def ours(opened: OpenedModel, ids: list[int], count: int, rounds: bool) -> Tensor:
    """Log-probabilities of the last ``count`` tokens, with activations rounded or not."""
    model = model_of(opened.spec)
    model.load_state_dict(opened.artifact.weights)
    minima = {
        item.entry.name: item.coded.zeros
        for item in opened.artifact.encoded
        if item.coded is not None and item.entry.grid.levels.endswith("_1")
    }
    product = product_in_8_bits if rounds else lambda x, w, minima: F.linear(x, w)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(product, w=layer.weight, minima=minima.get(f"{name}.weight"))
    if model.lm_head is not None:
        logits = model(torch.tensor([ids[:-1]]))
    else:
        name = "model.embed_tokens.weight"
        hidden = model.model(torch.tensor([ids[:-1]]))
        logits = product(hidden, opened.artifact.weights[name], minima.get(name))
    return logits[0, -count:].log_softmax(-1)


def divergence(theirs: Tensor, other: Tensor) -> float:
    """Mean KL in nats."""
    return float((theirs.exp() * (theirs - other)).sum(-1).mean())


def compare(
    opened: OpenedModel, tokenizer: Tokenizer, path: Path, what: str
) -> tuple[float, float]:
    """Mean KL of 64 tokens in nats: to ours, and to ours with activations rounded to 8 bits."""
    tokens, theirs = log_probabilities(continued(path, num_probs=320), 320)
    assert len(tokens) == NEW_TOKENS
    ids = [*tokenizer.encode_document(PROMPT), *tokens]
    plain, rounded = (ours(opened, ids, NEW_TOKENS, rounds) for rounds in (False, True))
    found, explained = divergence(theirs, plain), divergence(theirs, rounded)
    likely = theirs > math.log(1e-3)
    print(
        f"\n{what}: KL {found:.1e} nats, with our activations rounded to 8 bits {explained:.1e}; "
        f"log-probabilities over 0.001 differ by {(theirs - plain)[likely].abs().max():.1e}, "
        f"{(theirs - rounded)[likely].abs().max():.1e} at most"
    )
    return found, explained


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", [None, "int8", "int4", *OF_GGUF])
def test_probabilities(
    name: str | None, is_tied: bool, stored: Callable[..., OpenedModel], tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Of float32 tensors they are ours; of blocks they differ by what 8-bit activations do: if ours
    are rounded as well, at most by half of it (one rounded the other way may weigh as much)."""
    grid = replace(named(name or "int8"), group_size=32)
    rules = RULES if name else {"*1.self_attn.v_proj*": "grid", "*": "fp32"}
    spec = SPEC if is_tied else untied()
    opened = stored(replace(spec, more={"rope_base": 5e4, "norm_eps": 1e-5}), grid, rules)
    write_gguf(tmp_path / "m.gguf", opened, tokenizer)
    found, explained = compare(opened, tokenizer, tmp_path / "m.gguf", str(name))
    assert found < (1e-3 if name else 1e-5)
    assert not name or explained < found / 2


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["q4_0", "mxfp4", "int8"])
def test_a_trained_model_writes_the_same_text(
    grid: str, program, cache_dir: Path, tmp_path: Path
) -> None:
    """64 tokens of ``task=sample temperature=0``."""
    (tmp_path / "text.txt").write_text("\n".join(islice(web_bible(), 100)))
    text = f"data.cache_dir={cache_dir}"
    done = program("train.py", *TINY, "data.files=[text.txt]", text, "model=llama_4x288",
                   "model.mlp_mult=3", f"qat={grid}", "grid.group_size=32", "seq_len=128",
                   "batch_tokens=2048", "micro_batch_tokens=2048", "max_steps=200",
                   "qat.start_step=100", "run_name=r")  # fmt: skip
    assert done.code == 0, done.err
    done = program("eval.py", "task=export", "run=r", "out=m.gguf", text)
    assert done.code == 0, done.err
    assert "tensors, bit for bit" in done.out
    done = program("eval.py", "task=sample", "run=r", text, f"prompt={PROMPT}",
                   f"sample.max_tokens={NEW_TOKENS}", "sample.temperature=0")  # fmt: skip
    assert done.code == 0, done.err
    assert PROMPT + continued(Path("m.gguf"))["text"] == done.out.removesuffix("\n")

    opened = open_artifact(Path("logs/runs/r/artifact.qat"))
    tokenizer = open_validation(opened, DataSettings("from_artifact", cache_dir=str(cache_dir)))[1]
    compare(opened, tokenizer, Path("m.gguf"), "a trained model")


def test_texts_are_cut_alike(
    stored: Callable[..., OpenedModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Seen by what llama.cpp makes of them."""
    opened = stored()
    write_gguf(tmp_path / "m.gguf", opened, tokenizer)
    for prompt in ("", "  two  spaces ", "h\u00e9 \u6f22 \U0001f600\n\t", "the earth and sea."):
        found = continued(tmp_path / "m.gguf", prompt, num_probs=320)
        tokens, theirs = log_probabilities(found, 320)
        ids = [*tokenizer.encode_document(prompt), *tokens]
        rounded = ours(opened, ids, len(tokens), True)
        assert divergence(theirs, rounded) < 1e-2, prompt
