"""Small Llamas as artifacts, with a tokenizer made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from qat.artifact.container import pack, write_whole
from qat.evaluation.open_model import OpenedModel, artifact_meta, open_artifact
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.text.tokenizer import Tokenizer, train_tokenizer
from tests.conftest import ROOT, shared_folder

SPEC = ModelSpec(320, 2, 64, 4, 2, 3, True, "llama")
NOT_TEXT = 3 + 256  # pieces: the specials and the bytes come first
Q8 = Grid(bits=8, group_size=32)
RULES = {"*norm*": "fp32", "*": "grid"}
OF_GGUF = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"]


def named(name: str) -> Grid:
    return Grid(**yaml.safe_load((ROOT / f"conf/grid/{name}.yaml").read_text()))


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with shared_folder(tmp_path_factory, "exported_tokenizer") as (folder, is_first):
        if is_first:
            train_tokenizer([corpus.read_text()], SPEC.vocab_size, folder / "tokenizer.model")
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture
def stored(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., OpenedModel]:
    """stored(spec, grid, rules): ``a.qat`` of random weights, opened."""

    def make(spec: ModelSpec = SPEC, grid: Grid = Q8, rules: dict[str, str] = RULES) -> OpenedModel:
        generator = torch.Generator().manual_seed(3)
        shapes = tensor_shapes(spec)
        weights = {name: 0.3 * torch.randn(s, generator=generator) for name, s in shapes.items()}
        for name, w in weights.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                w[:NOT_TEXT] = 0.0  # never the likeliest: llama.cpp is silent on half characters
        plan = build_plan(shapes, {"grid": grid}, rules)
        meta = artifact_meta(spec, 128, tokenizer.sha256, {"name": "shards"})
        path = tmp_path / "a.qat"
        write_whole(path, pack(plan.encode(weights), plan, meta, "zstd"))
        return open_artifact(path)

    return make


def untied(spec: ModelSpec = SPEC) -> ModelSpec:
    return replace(spec, tie_embeddings=False)
