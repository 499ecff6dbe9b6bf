"""``cabinet.run`` on models that are no language model: rows, what is kept, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat import Grid, Plan, QatModel, cabinet
from qat.cabinet import bitsandbytes_variants, measure, torchao_variants
from qat.cabinet.grid_variants import grid_variants
from qat.cabinet.objective import Objective
from qat.cabinet.variant import Frozen, held_tensors, inner_bytes
from qat.errors import UserError
from qat.ptq.gptq import row_output_errors
from tests.cabinet.cabinet_rows import CEILINGS

DIM, CLASSES = 32, 3
ERROR = Objective("error", "error", 0.01)


class Encoder(nn.Module):
    """Embedding, a layer of torch's own with biases, a norm with buffers, and a head of pooled
    vectors. Padding has id 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, DIM)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, 4, 64, batch_first=True) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(DIM)
        self.classifier = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x_BTC = self.embedding(ids)
        padding = None if attention_mask is None else attention_mask == 0
        for layer in self.layers:
            x_BTC = layer(x_BTC, src_key_padding_mask=padding)
        if attention_mask is not None:
            x_BTC = x_BTC * attention_mask[..., None]
        return self.classifier(self.norm(x_BTC.mean(1)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine could do is measured in tests of its own, and takes seconds."""
    monkeypatch.setattr(measure, "measure_ceilings", lambda _: CEILINGS)


@pytest.fixture
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(1, 20, (24, 6), generator=generator).split(8))


def error_from(model: nn.Module) -> Callable[[nn.Module], dict[str, float]]:
    """Mean squared change of logits, which only a changed model has."""
    with torch.no_grad():
        exact = [model.eval()(batch) for batch in batches()]
    model.train()

    def evaluate(variant: nn.Module) -> dict[str, float]:
        found = [variant(b) for b in batches()]
        errors = [(a - b).square().mean() for a, b in zip(found, exact, strict=True)]
        return {"error": float(torch.stack(errors).mean()), "answer": 42.0}

    return evaluate


def cabinet_of(model: nn.Module, folder: Path, **changed: Any) -> dict[str, dict[str, Any]]:
    asked: dict[str, Any] = {
        "inputs": batches(), "objective": ERROR, "repeats": 1,
        "variants": ["fp32", "rtn_int8", "rtn_int4", "gptq_int4"],
    } | changed  # fmt: skip
    if "evaluate" not in asked:
        asked["evaluate"] = error_from(model)
    return {row["variant"]: row for row in cabinet.run(model, folder=folder, **asked)}


ONE_OF_EACH = [
    "fp32", "bf16", "rtn_int8", "rtn_int4", "gptq_int4_e8", "awq_int4_e8", "smoothquant_w8a8",
    "torchao Int8WeightOnly", "torchao Float8Dynamic*", "bitsandbytes LLM.int8",
    "bitsandbytes NF4 double",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "variants", [pytest.param(ONE_OF_EACH, id="few"), pytest.param(None, marks=pytest.mark.slow)]
)
def test_every_variant_is_a_row_and_what_is_kept_stays(
    model: Encoder, tmp_path: Path, variants: list[str] | None
) -> None:
    """Libraries too; the model itself is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = [name for name in before if name.startswith(("classifier", "layers.1.linear2"))]
    evaluate, seen = error_from(model), []

    def watching(variant: nn.Module) -> Mapping[str, float]:
        state = variant.state_dict()
        seen.append(all(state[name].equal(before[name]) for name in kept))
        return evaluate(variant)

    rows = cabinet_of(
        model, tmp_path, evaluate=watching, keep=["classifier*", "layers.1.linear2"],
        variants=variants,
    )  # fmt: skip
    assert len(rows) == len(ONE_OF_EACH) if variants else len(rows) > 45
    measured = {name: row for name, row in rows.items() if row["status"] == "measured"}
    assert all(row["reason"] for row in rows.values() if row["status"] != "measured")
    assert {name for name in ONE_OF_EACH if "*" not in name} <= measured.keys()
    assert all(seen)
    assert len(seen) == len(measured)
    assert measured["fp32"]["gap_error"] == 0.0
    assert measured["fp32"]["error"] < 1e-12  # the model itself may take faster kernels
    for name, row in measured.items():
        assert name == "fp32" or row["error"] > 1e-9, name
        stored = name.lower().removesuffix("_h32")  # rotated in blocks of 32
        is_fine = any(bits in stored for bits in ("int8", "w8a8", "float8", "16", "32"))
        assert row["error"] < (1e-4 if is_fine else 0.1), name
        if row["family"] in ("torchao", "bitsandbytes"):  # embeddings stay floats
            assert row["error"] < measured["rtn_int4"]["error"] / 2, name
        assert row["latency_ms"] > 0
        assert row["items_per_second"] > 0
    assert measured["rtn_int8"]["error"] < measured["rtn_int4"]["error"]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    report = (tmp_path / "REPORT.md").read_text()
    assert "| answer |" in report
    assert "smaller file and a lower error" in report
    assert (tmp_path / "pareto_bytes.png").stat().st_size > 0


@pytest.mark.slow
def test_nothing_is_measured_twice(model: Encoder, tmp_path: Path) -> None:
    cabinet_of(model, tmp_path, variants=["fp32", "rtn_int8"])

    def never(_: nn.Module) -> dict[str, float]:
        raise AssertionError("measured again")

    again = cabinet_of(model, tmp_path, variants=["fp32", "rtn_int8"], evaluate=never)
    assert list(again) == ["fp32", "rtn_int8"]
    assert json.loads((tmp_path / "results.json").read_text()) == list(again.values())
    calls: list[str] = []
    evaluate = error_from(model)

    def stopped(variant: nn.Module) -> dict[str, float]:
        calls.append("")
        if len(calls) == 3:  # the float model, rtn_int6, and in the midst of the next
            raise KeyboardInterrupt
        return evaluate(variant)

    names = ["fp32", "rtn_int8", "rtn_int6", "rtn_int5"]
    with pytest.raises(KeyboardInterrupt):
        cabinet_of(model, tmp_path, variants=names, evaluate=stopped)
    whole = cabinet_of(model, tmp_path, variants=names)
    assert list(whole) == names
    assert whole["rtn_int6"]["make_seconds"] == json.loads(
        (tmp_path / "rtn_int6" / "metrics.json").read_text()
    )["make_seconds"]  # fmt: skip


def test_matrices_are_calibrated_on_what_they_read(model: Encoder) -> None:
    """Per matrix the mean over what it reads: tokens, or one pooled vector of each text; padding
    is not counted."""
    seen: dict[str, list[Tensor]] = {"layers.1.linear1": [], "classifier": []}
    for name, found in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0].detach())
        )
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    masked = [{"ids": ids, "attention_mask": mask} for ids in batches()]
    frozen = Frozen.of_module(model, masked)
    for found in seen.values():
        found.clear()
    inputs = frozen.inputs("train")
    for name, found in seen.items():
        x = torch.cat([t[mask.bool()] if t.dim() == 3 else t for t in found])
        torch.testing.assert_close(inputs.hessian(f"{name}.weight"), x.T @ x / len(x))
    assert inputs.of["classifier.weight"].count == 24
    assert inputs.of["layers.1.linear1.weight"].count == 3 * int(mask.sum())
    made = {v.name: v.make() for v in grid_variants(frozen) if v.name.endswith("_int4")}
    for name, w in frozen.weights.items():
        if name in inputs.of:
            errors = {
                kind: float(
                    row_output_errors(
                        made[f"{kind}_int4"].module.get_parameter(name) - w, inputs.hessian(name)
                    ).sum()
                )
                for kind in ("rtn", "gptq")
            }
            assert errors["gptq"] < errors["rtn"], name


def test_bytes_are_true(model: Encoder) -> None:
    """Buffers that a file holds count, and what is kept is held whole."""
    frozen = Frozen.of_module(model, batches(), keep=["classifier"])
    made = {v.name: v.make() for v in grid_variants(frozen) if v.name in ("fp32", "rtn_int8")}
    parameters = sum(p.numel() for p in model.parameters())
    buffers = 4 * 2 * DIM + 8  # running mean and variance, and a count
    assert made["fp32"].memory_bytes == 4 * parameters + buffers
    kept = sum(p.numel() for p in model.classifier.parameters())
    matrices = [
        p for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith("classifier")
    ]
    codes, rows = sum(p.numel() for p in matrices), sum(len(p) for p in matrices)
    assert made["rtn_int8"].memory_bytes == (
        codes + 2 * rows + 4 * (parameters - codes - kept) + 4 * kept + buffers
    )
    torchao = {v.name: v for v in torchao_variants.torchao_variants(frozen)}
    held = torchao["torchao Int8WeightOnly"].make()
    inner = frozen.inner_linears(frozen.module)
    assert {"layers.0.linear1", "layers.0.linear2"} <= inner.keys()
    assert "classifier" not in inner
    assert not [name for name in inner if "self_attn" in name]  # its weight is read, not it
    quantized = sum(5 * layer.out_features + layer.weight.numel() for layer in inner.values())
    floats = 4 * (parameters - sum(layer.weight.numel() for layer in inner.values()))
    assert held.memory_bytes == quantized + floats + buffers
    assert inner_bytes(held_tensors(frozen.module)) == 4 * parameters + buffers


@pytest.mark.slow
def test_a_file_of_qat_is_a_row(model: Encoder, tmp_path: Path) -> None:
    grid = Grid(bits=4)  # of attention too, whose first matrix is in no nn.Linear
    plan = Plan.for_model(model, grid, keep=["classifier*"], rules={"*in_proj_weight": grid})
    size = QatModel(model, plan).save(tmp_path / "four.qat")
    QatModel(nn.Linear(4, 4), Plan.for_model(nn.Linear(4, 4), Grid(bits=4))).save(
        tmp_path / "other.qat"
    )
    files = {name: tmp_path / f"{name}.qat" for name in ("four", "other", "lost")}
    rows = cabinet_of(
        model, tmp_path / "c", files=files, keep=["classifier*"],
        variants=["rtn_int4", *files],
    )  # fmt: skip
    assert rows["four"]["family"] == "qat"
    assert rows["four"]["disk_bytes"] == size
    assert rows["four"]["error"] == rows["rtn_int4"]["error"]
    with torch.no_grad():  # trained on: another file of the same name is another row
        changed = copy.deepcopy(model)
        changed.embedding.weight *= 1.5
    QatModel(changed, plan).save(tmp_path / "four.qat")
    again = cabinet_of(
        model, tmp_path / "c", files=files, keep=["classifier*"], variants=["rtn_int4", "four"]
    )
    assert again["four"]["error"] > 1.2 * rows["four"]["error"]
    assert again["rtn_int4"] == rows["rtn_int4"]
    assert "another model's tensors" in rows["other"]["reason"]
    assert "lost.qat" in rows["lost"]["reason"]


def test_what_is_not_installed_is_a_reason(
    model: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in (torchao_variants, bitsandbytes_variants):
        monkeypatch.setattr(library, "find_spec", lambda _: None)
    rows = cabinet_of(model, tmp_path, variants=["torchao Int8*", "bitsandbytes *"])
    assert {row["status"] for row in rows.values()} == {"unavailable"}
    assert all("pip install -e '.[cabinet]'" in row["reason"] for row in rows.values())


@pytest.mark.slow
def test_a_variant_that_is_not_finite_is_a_reason(model: Encoder, tmp_path: Path) -> None:
    evaluate = error_from(model)

    def overflowing(variant: nn.Module) -> dict[str, float]:
        found = evaluate(variant)
        return found if found["error"] < 1e-12 else {"error": float("nan")}

    rows = cabinet_of(model, tmp_path, evaluate=overflowing, variants=["fp32", "rtn_int4"])
    assert rows["rtn_int4"]["status"] == "unavailable"
    assert rows["rtn_int4"]["reason"] == "its error is nan: outputs are not finite"


class Noisy(Encoder):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids) + torch.randn(len(ids), CLASSES)


class Overflowing(Encoder):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids) / 0.0


def test_mistakes_are_one_line(model: Encoder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    short = Encoder()
    short.config = SimpleNamespace(max_position_embeddings=5)  # as models of transformers say it
    norm = nn.Sequential(nn.LayerNorm(4))
    asked: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("keep: 'head*' matches no parameter or module", model, {"keep": ["head*"]}),
        ("inputs: there are none", model, {"inputs": []}),
        ("inputs: batch 2 has texts of 6 tokens, the model's positions end at 5", short,
         {"inputs": [{"input_ids": ids} for ids in (batches()[0][:, :5], batches()[0])]}),
        ("variants = ['int9']: names none of fp32, bf16", model, {"variants": ["int9"]}),
        ("objective = f1: evaluate returns error, answer", model,
         {"objective": replace(ERROR, key="f1")}),
        ("objective = None: name the number", model, {"objective": None}),
        ("model: it gives other outputs for the same inputs", Noisy(), {}),
        ("model: its outputs hold NaN or infinity", Overflowing(), {}),
        ("embedding.weight is torch.float64: give model.float()", Encoder().double(), {}),
        ("model: none of its matrices goes through", norm,
         {"inputs": [torch.ones(2, 4)], "evaluate": lambda _: {"error": 0.0}}),
    ]  # fmt: skip
    for line, wrong, changed in asked:
        with pytest.raises(UserError) as caught:
            cabinet_of(wrong, tmp_path / "c", **{"evaluate": error_from(model)} | changed)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "c").rglob("metrics.json"))


@pytest.mark.slow
def test_rows_of_something_else_are_not_mixed(model: Encoder, tmp_path: Path) -> None:
    cabinet_of(model, tmp_path, variants=["fp32"])
    for changed, key in (
        ({"keep": ["classifier"]}, "kept"),
        ({"inputs": batches()[:2]}, "inputs_sha256"),
        ({"objective": replace(ERROR, max_gap=0.5)}, "objective"),
    ):
        with pytest.raises(UserError, match=f"were measured with another {key}"):
            cabinet_of(model, tmp_path, variants=["fp32"], **changed)
    with torch.no_grad():
        model.classifier.weight += 1
    with pytest.raises(UserError, match="were measured with another weights_sha256"):
        cabinet_of(model, tmp_path, variants=["fp32"])
