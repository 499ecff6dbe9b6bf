"""Small Llamas as artifacts, with a tokenizer made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.artifact.container import pack, write_whole
from qat.evaluation.open_model import OpenedModel, artifact_meta, open_artifact
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from qat.text.tokenizer import Tokenizer, train_tokenizer
from tests.conftest import shared_folder

SPEC = ModelSpec(320, 2, 64, 4, 2, 3, True, "llama")
Q8 = Grid(bits=8, group_size=32)
RULES = {"*norm*": "fp32", "*": "grid"}


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
        plan = build_plan(shapes, {"grid": grid}, rules)
        meta = artifact_meta(spec, 32, tokenizer.sha256, {"name": "shards"})
        path = tmp_path / "a.qat"
        write_whole(path, pack(plan.encode(weights), plan, meta, "zstd"))
        return open_artifact(path)

    return make


def untied(spec: ModelSpec = SPEC) -> ModelSpec:
    return replace(spec, tie_embeddings=False)
