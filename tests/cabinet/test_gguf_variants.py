"""GGUF rows: the file, its bytes, and blocks against ggml's formulas written out here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.cabinet import gguf_variants as rows
from qat.cabinet.gguf_variants import FORMATS, gguf_variants
from qat.errors import UserError
from qat.model.spec import ModelSpec
from tests.cabinet.conftest import SHAPE, logits_of, named, plain_logits, random_weights

BLOCK_BYTES = {"Q8_0": 34, "Q5_1": 24, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18}


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def decoded_block(weight: Tensor, name: str) -> np.ndarray:
    """Blocks of 32, encoded and decoded as ggml's documentation of the formats says."""
    x = weight.numpy().reshape(-1, 32)
    bits = int(name[1])
    if name == "Q8_0":
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        return (np.floor(np.abs(x) / scale + 0.5) * np.sign(x) * half(scale)).reshape(weight.shape)
    if name.endswith("_1"):
        low = x.min(axis=1, keepdims=True)
        scale = (x.max(axis=1, keepdims=True) - low) / np.float32(2**bits - 1)
        codes = np.clip(np.floor((x - low) / scale + 0.5), 0, 2**bits - 1)
        return (codes * half(scale) + half(low)).reshape(weight.shape)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    scale = extreme / np.float32(-(2 ** (bits - 1)))
    codes = np.clip(np.floor(x / scale + 2 ** (bits - 1) + 0.5), 0, 2**bits - 1)
    return ((codes - 2 ** (bits - 1)) * half(scale)).reshape(weight.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_holds_the_variant(name: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, quants

    kept = named(gguf_variants(SHAPE, weights, tmp_path / "new"), f"gguf {name}").make()
    path = tmp_path / "new" / f"{name}.gguf"
    assert kept.disk_bytes == len(path.read_bytes())
    assert kept.embedding == name
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    assert set(tensors) == set(weights) == set(kept.weights)
    num_bytes = 0
    for key, weight in weights.items():
        is_matrix = key.endswith(".weight")
        dtype = GGMLQuantizationType[name if is_matrix else "F32"]
        assert tensors[key].tensor_type == dtype
        assert tensors[key].data.tobytes() == quants.quantize(weight.numpy(), dtype).tobytes()
        num_bytes += weight.numel() // 32 * BLOCK_BYTES[name] if is_matrix else 4 * weight.numel()
        assert kept.weights[key].shape == weight.shape
        assert kept.weights[key].dtype == torch.float32
    assert kept.memory_bytes == num_bytes
    assert num_bytes < kept.disk_bytes < num_bytes + 3000  # names, shapes and padding


@pytest.mark.parametrize("name", FORMATS)
def test_rows_compute_with_ggmls_blocks(
    name: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = named(gguf_variants(SHAPE, weights, tmp_path), f"gguf {name}").make()
    expected = {
        key: torch.from_numpy(decoded_block(w, name)) if key.endswith(".weight") else w
        for key, w in weights.items()
    }
    for key in weights:  # a step or two may fall to the other side of a half
        share = torch.isclose(kept.weights[key], expected[key], rtol=0, atol=1e-6).float().mean()
        assert share > 0.999, key
    torch.testing.assert_close(logits_of(kept), plain_logits(expected), rtol=0, atol=0.05)
    assert (logits_of(kept) - plain_logits(weights)).abs().max() > 1e-2


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from(FORMATS))
def test_no_weight_is_off_by_more_than_a_scale(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float, name: str
) -> None:
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * scale
    noise[1, :32] = 0  # a block of nothing
    folder = tmp_path_factory.mktemp("blocks")
    kept = named(gguf_variants(SHAPE, {"some.weight": noise}, folder), f"gguf {name}").make()
    error = (kept.weights["some.weight"] - noise).reshape(-1, 32).abs().amax(dim=1)
    blocks = noise.reshape(-1, 32)
    reach = 2 * blocks.abs().amax(dim=1)
    scale = reach / (2 ** int(name[1]) - 1)
    assert (error <= scale * 1.1).all()  # Q4_0 and Q5_0 clip the far end: a whole scale, not half
    assert error[2] == 0


def test_rows_that_are_no_multiple_of_a_block_stay_float16(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    shape = ModelSpec(96, 2, 48, 4, 2, 2, True)
    weights = random_weights(shape)
    kept = named(gguf_variants(shape, weights, tmp_path), "gguf Q4_0").make()
    assert kept.embedding == "F16 (rows of 48 are no multiple of 32)"
    kinds = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "Q4_0.gguf").tensors}
    assert kinds["tok_emb.weight"] == GGMLQuantizationType.F16
    assert kinds["blocks.0.mlp.proj.weight"] == GGMLQuantizationType.Q4_0  # rows of 96
    key = "blocks.0.attn.c_q.weight"
    assert torch.equal(kept.weights[key], weights[key].half().float())
    assert torch.equal(kept.weights["skip_weights"], weights["skip_weights"])


def test_bad_places_and_missing_packages(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    variants = gguf_variants(SHAPE, weights, tmp_path / "file" / "within")
    with pytest.raises(UserError, match=r"Q8_0\.gguf: Not a directory"):
        variants[0].make()
    assert [v.missing() for v in variants] == [None] * 5
    monkeypatch.setattr(rows, "find_spec", lambda _: None)
    assert variants[0].missing() == "needs gguf: pip install -e '.[cabinet]'"
