"""Variants on the project's grids: what they say they hold is what a file of them gives back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.artifact.container import pack, read_artifact
from qat.cabinet import grid_variants as grid_variants_file
from qat.cabinet.grid_variants import GRIDS, RANK, grid_variants, kept, plan_for
from qat.cabinet.variant import Frozen, Kept, inner_bytes
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.ptq.calibration import SELF_TOKENS, SEQUENCES, random_sequences, written_sequences
from qat.ptq.gptq import row_output_errors
from qat.ptq.methods import Method, encoded_by, gptq, lite, nearest
from qat.ptq.smoothquant import migration_scales, snap_tokens
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Plan
from qat.quantize.rounding import decode, encode
from qat.text.tokenizer import BOS_ID

SHAPE = ModelSpec(48, 2, 64, 4, 2, 2, True)


def frozen(shape: ModelSpec = SHAPE) -> Frozen:
    """Weights with rows and columns of their own scales, and inputs that are correlated."""
    torch.manual_seed(0)
    weights = {}
    for name, p in GPT(shape).named_parameters():
        w = torch.randn_like(p) * 0.2
        if p.ndim == 2 and name.endswith(".weight"):
            w *= torch.rand(p.size(0), 1).exp() * torch.rand(1, p.size(1)).exp()
        weights[name] = w.detach()
    texts = {
        "train": lambda: [random_sequences(shape, 16, 1)],
        "self": lambda: [written_sequences(shape, weights, BOS_ID, 2)],
        "random": lambda: [random_sequences(shape, 16, 3)],
    }
    return Frozen.of_spec(shape, weights, texts)


def weights_of(made: Kept) -> dict[str, torch.Tensor]:
    return dict(made.module.named_parameters())


@pytest.fixture(scope="module")
def model() -> Frozen:
    return frozen()


@pytest.fixture(scope="module")
def made(model: Frozen) -> dict[str, Kept]:
    return {v.name: v.make() for v in grid_variants(model) if v.missing() is None}


def logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.func.functional_call(GPT(SHAPE), weights, (ids,))


def test_names_are_unique_and_all_can_be_made(model: Frozen) -> None:
    variants = grid_variants(model)
    assert len({v.name for v in variants}) == len(variants)
    assert not [v.name for v in variants if v.missing()]


def test_weights_are_those_of_a_file(model: Frozen, tmp_path: Path) -> None:
    plan = plan_for(model, GRIDS["int4_g64"], GRIDS["int8"])
    for method in (nearest, gptq(model.inputs("train"))):
        encoded = encoded_by(plan, model.weights, method)
        found = kept(encoded, model)
        data = pack(encoded, plan, {}, "mix")
        (tmp_path / "a.qat").write_bytes(data)
        assert found.disk_bytes == len(data)
        read = read_artifact(tmp_path / "a.qat")
        for name, w in weights_of(found).items():
            assert w.equal(read.weights[name]), name


@pytest.mark.slow
def test_bytes_are_those_held(made: dict[str, Kept]) -> None:
    codes = sum(w.numel() for n, w in weights_of(made["fp32"]).items() if n.endswith(".weight"))
    rows = sum(w.shape[0] for n, w in weights_of(made["fp32"]).items() if n.endswith(".weight"))
    vectors = sum(
        w.numel() for n, w in weights_of(made["fp32"]).items() if not n.endswith(".weight")
    )
    assert made["fp32"].memory_bytes == 4 * (codes + vectors)
    assert made["bf16"].memory_bytes == made["fp16"].memory_bytes == 2 * (codes + vectors)
    assert made["rtn_int8"].memory_bytes == codes + 2 * rows + 4 * vectors
    assert made["rtn_int4_h32"].memory_bytes == made["rtn_int4"].memory_bytes
    assert made["rtn_int4_h32"].embedding == "int4_h32"
    assert made["rtn_int4_g64"].embedding == "int4_g64"
    assert made["rtn_int4_g64_e8"].embedding == "int8"
    assert made["rtn_int4"].disk_bytes < made["rtn_int6"].disk_bytes < made["rtn_int8"].disk_bytes
    floats = weights_of(made["fp32"])
    shapes = {n: w.shape for n, w in floats.items() if ".attn.c" in n or ".proj" in n
              or ".fc" in n}  # fmt: skip
    factors = 2 * RANK * sum(rows + columns for rows, columns in shapes.values())
    lqer, rounded = made["lqer_int4_g64_e8"], made["rtn_int4_g64_e8"]
    assert lqer.memory_bytes - rounded.memory_bytes == factors
    assert lqer.disk_bytes - rounded.disk_bytes == factors


def test_matrices_smaller_than_the_rank_are_corrected_as_far_as_they_go() -> None:
    small = frozen(ModelSpec(48, 1, 4, 1, 1, 1, True))
    (variant,) = [v for v in grid_variants(small) if v.name == "lqer_int4_g64_e8"]
    assert variant.make().memory_bytes > 0


@pytest.mark.slow
def test_real_zero_points_are_counted(made: dict[str, Kept]) -> None:
    found, rounded = made["hqq_int4_g64_e8"], made["rtn_int4_g64_e8"]
    groups = sum(w.shape[0] * -(-w.shape[1] // 64) for n, w in weights_of(found).items()
                 if n.startswith("blocks") and n.endswith(".weight"))  # fmt: skip
    assert found.memory_bytes - rounded.memory_bytes == 2 * groups


@pytest.mark.slow
def test_gptq_makes_the_outputs_better(model: Frozen, made: dict[str, Kept]) -> None:
    """On the text it was calibrated on, matrix by matrix, the tied head among them."""
    inputs = model.inputs("train")
    for name, w in model.weights.items():
        if not name.endswith(".weight"):
            continue
        errors = {
            variant: float(
                row_output_errors(weights_of(made[variant])[name] - w, inputs.hessian(name)).sum()
            )
            for variant in (
                "rtn_int4",
                "gptq_int4",
                "rtn_int4_g64_e8",
                "gptq_plain_int4_g64_e8",
                "rtn_int4_h32",
                "gptq_int4_h32",
            )
        }
        assert errors["gptq_int4"] < errors["rtn_int4"], name
        assert errors["gptq_int4_h32"] < errors["rtn_int4_h32"], name
        assert errors["gptq_plain_int4_g64_e8"] <= errors["rtn_int4_g64_e8"], name


@pytest.mark.slow
def test_sequential_gptq_reads_what_came_before(model: Frozen, made: dict[str, Kept]) -> None:
    one, two = (weights_of(made[f"gptq_{kind}int4_g64_e8"]) for kind in ("", "sequential_"))
    first = [n for n in one if n.startswith("blocks.0.") and n.endswith(".weight")]
    later = [n for n in one if n.startswith("blocks.1.") and n.endswith(".weight")]
    assert all(one[name].equal(two[name]) for name in first)
    assert not any(one[name].equal(two[name]) for name in later)


def test_lite_takes_the_best_clip_of_each_row() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 2000)
    w[0, 0] = 30.0  # worth clipping
    grid = Grid(bits=4)
    plan = plan_for(frozen(), grid, grid)
    entry, codes = lite(plan.entries["tok_emb.weight"], w, None)
    errors = (decode(codes, entry.grid) - w).square().sum(1)
    candidates = torch.stack([
        (decode(encode(w, Grid(bits=4, scale_rule="percentile", percentile=p)), grid) - w)
        .square().sum(1)
        for p in (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    ])  # fmt: skip
    assert errors.allclose(candidates.amin(0))
    assert errors[0] < 0.5 * candidates[-1, 0]


def test_folding_channel_scales_changes_no_output(
    model: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float weights that are rounded compute what the trained ones do."""
    seen: dict[str, torch.Tensor] = {}

    def catch(plan: Plan, weights: dict[str, torch.Tensor], method: Method) -> list[Encoded]:
        seen.update(weights)
        return encoded_by(plan, weights, method)

    monkeypatch.setattr(grid_variants_file, "encoded_by", catch)
    grid_variants_file._folded(model, GRIDS["int8_tensor"])
    ids = torch.cat(model.batches("random"))[:4]
    assert logits(seen, ids).allclose(logits(model.weights, ids), atol=1e-4)
    assert not seen["blocks.0.mlp.proj.weight"].equal(model.weights["blocks.0.mlp.proj.weight"])


@pytest.mark.slow
def test_smoothquant_reads_int8_activations(model: Frozen, made: dict[str, Kept]) -> None:
    found = made["smoothquant_w8a8"]
    ids = torch.cat(model.batches("random"))[:4]
    with torch.inference_mode():
        quantized = found.module(ids)
    exact = logits(model.weights, ids)
    rounded = logits(weights_of(made["rtn_int8"]), ids)
    assert not quantized.equal(exact)
    assert (quantized - exact).abs().mean() < 0.3 * exact.std()
    assert (quantized - rounded).abs().max() > 0
    name = "blocks.0.mlp.fc.weight"
    largest = model.inputs("train").of[name].largest
    scale = migration_scales(largest, [model.weights[name]])
    x = torch.randn(3, 64)
    with torch.inference_mode():
        expected = snap_tokens(x / scale) @ weights_of(found)[name].T
        assert found.module.blocks[0].mlp.fc(x).allclose(expected, atol=1e-5)


def test_an_untied_embedding_is_rounded_and_its_head_is_not() -> None:
    shape = replace(SHAPE, tie_embeddings=False)
    untied = frozen(shape)
    made = {v.name: v.make() for v in grid_variants(untied) if v.name in ("rtn_int4", "gptq_int4")}
    rounded, better = weights_of(made["rtn_int4"]), weights_of(made["gptq_int4"])
    assert rounded["tok_emb.weight"].equal(better["tok_emb.weight"])
    assert not rounded["lm_head.weight"].equal(better["lm_head.weight"])


@pytest.mark.slow
def test_written_text_is_the_models_own(model: Frozen) -> None:
    ids = torch.cat(model.batches("self"))
    assert ids.shape == (SEQUENCES, SELF_TOKENS)
    assert (ids[:, 0] == 1).all()
    again = written_sequences(SHAPE, model.weights, BOS_ID, 2)
    assert ids.equal(again)
    # Tokens that the model finds likely are drawn more often than others.
    shares = logits(model.weights, ids[:, :-1]).softmax(-1)
    drawn = shares.gather(-1, ids[:, 1:, None]).mean()
    assert float(drawn) == pytest.approx(float(shares.square().sum(-1).mean()), rel=0.05)


def test_shared_storage_counts_once() -> None:
    w = torch.randn(10, 10)
    assert inner_bytes([w, w]) == 400
    assert inner_bytes([w, torch.randn(5)]) == 420
