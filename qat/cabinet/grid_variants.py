"""Variants on this project's grids: rounding by every rule, GPTQ, AWQ, LQER, SmoothQuant.

All matrices are on the grid that the name says; ``_e8`` keeps the embeddings (and a language
model's untied head) at int8 instead. Vectors are fp32. Bytes are those of an artifact with the
codes that the variant has, coded by ``mix``, and of buffers as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from qat.artifact.container import pack, read_artifact
from qat.cabinet.variant import (
    Frozen,
    Kept,
    Variant,
    held_tensors,
    inner_bytes,
    unmade,
    with_weights,
)
from qat.errors import UserError
from qat.ptq.hqq import hqq
from qat.ptq.layer_inputs import LayerInputs
from qat.ptq.lqer import lqer
from qat.ptq.methods import Method, encoded_by, gptq, lite, nearest, scaled
from qat.ptq.smoothquant import migration_scales, snap_tokens
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes

CODER = "mix"
RANK = 16  # of LQER's factors, or that of a smaller matrix
GRIDS = {
    "int8_tensor": Grid(bits=8, per_tensor=True),
    "int8": Grid(bits=8),
    "int6": Grid(bits=6),
    "int5": Grid(bits=5),
    "int4": Grid(bits=4),
    "int4_g64": Grid(bits=4, group_size=64),
    "int4_g128": Grid(bits=4, group_size=128),
    "int4_h32": Grid(bits=4, rotate=32),
    "int3": Grid(bits=3),
    "ternary": Grid(levels="ternary", scale_rule="absmean", refit=True),
}
CLIPS = {
    "int6_percentile": Grid(bits=6, scale_rule="percentile", percentile=0.999),
    "int6_sdclip": Grid(bits=6, scale_rule="sigma"),
    "int6_mse": Grid(bits=6, scale_rule="mse"),
    "int4_mse": Grid(bits=4, scale_rule="mse"),
}
# What other programs open, in blocks of their own.
SHIPPED = {
    "mxfp8": Grid("fp8_e4m3", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "mxfp4": Grid("e2m1", group_size=32, scale_rule="power", scale_dtype="e8m0"),
    "nvfp4": Grid("e2m1", group_size=16, scale_dtype="e4m3"),
    **{name: Grid(name, group_size=32) for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")},
}


def plan_for(model: Frozen, grid: Grid, embedding: Grid) -> Plan:
    """Every matrix on ``grid``, embeddings and head on theirs, what is kept and vectors fp32."""
    grids = dict.fromkeys(model.ends, embedding) | dict.fromkeys(model.matrices, grid)
    return Plan(
        [
            Entry(name, tuple(w.shape), grids.get(name) if w.dim() > 1 and w.numel() else None)
            for name, w in model.weights.items()
        ]
    )


def kept(encoded: list[Encoded], model: Frozen, more: Mapping[str, Tensor] | None = None) -> Kept:
    """Weights and bytes of what a file stores; ``more``: beside it, raw, added to the bytes."""
    plan = Plan([item.entry for item in encoded])
    held = [t for item in encoded if item.coded for t in item.coded if t is not None]
    held += [item.plain for item in encoded if item.plain is not None]
    buffers = held_tensors(model.module)[len(model.weights) :]
    beside = [*(more or {}).values(), *buffers]
    first = plan.entries[model.wiring.ends[0]] if model.wiring.ends else None
    weights = {item.entry.name: item.decode().to(model.device) for item in encoded}
    return Kept(
        module=with_weights(model.module, weights),
        disk_bytes=len(pack(encoded, plan, {}, CODER)) + inner_bytes(beside),
        memory_bytes=inner_bytes([*held, *beside]),
        embedding=None if first is None else first.grid.label if first.grid else first.dtype,
    )


def _with(made: Kept, changed: Mapping[str, Tensor]) -> Kept:
    """It computes with other weights where ``changed`` has them."""
    weights = {name: p.detach() for name, p in made.module.named_parameters()}
    weights |= {name: w.to(weights[name].device) for name, w in changed.items()}
    return replace(made, module=with_weights(made.module, weights))


def _floats(model: Frozen, dtype: str) -> Kept:
    plan = Plan(
        [
            Entry(name, tuple(w.shape), None, "fp32" if name in model.kept else dtype)
            for name, w in model.weights.items()
        ]
    )
    made = kept(plan.encode(model.weights), model)
    return replace(made, precision="bf16") if dtype == "bf16" else made


def _on_grid(
    model: Frozen, weights: Mapping[str, Tensor], grid: Grid, embedding: Grid, method: Method
) -> Kept:
    return kept(encoded_by(plan_for(model, grid, embedding), weights, method), model)


def _folded(model: Frozen, grid: Grid) -> Kept:
    """Channel scales folded into the matrices beside them: what the model computes stays, and a
    scale per tensor sees other rows."""
    assert callable(model.module.folded)
    return _on_grid(model, model.module.folded(model.weights), grid, grid, nearest)


def _calibrated(model: Frozen, kind: str) -> Kept:
    """GPTQ on another kind of text."""
    method = gptq(model.inputs(kind))
    return _on_grid(model, model.weights, GRIDS["int4_g64"], GRIDS["int8"], method)


def _sequential(model: Frozen, grid: Grid, embedding: Grid) -> Kept:
    """GPTQ block after block, each from what it reads once those before it are quantized."""
    plan = plan_for(model, grid, embedding)
    weights = dict(model.weights)
    encoded = {item.entry.name: item for item in plan.encode(weights)}
    for stage in (*model.wiring.blocks, *((name,) for name in model.wiring.ends)):
        part = Plan([plan.entries[name] for name in stage if name not in model.kept])
        for item in encoded_by(part, model.weights, gptq(model.read("train", weights))):
            encoded[item.entry.name] = item
            weights[item.entry.name] = item.decode().to(weights[item.entry.name].device)
    return kept(list(encoded.values()), model)


def _low_rank(model: Frozen, grid: Grid, embedding: Grid, inputs: LayerInputs) -> Kept:
    encoded = encoded_by(plan_for(model, grid, embedding), model.weights, nearest)
    factors: dict[str, Tensor] = {}
    corrected = {}
    for item in encoded:
        name = item.entry.name
        if name in model.matrices:
            stored, w = item.decode(), model.weights[name].cpu()
            found = lqer(w, stored, inputs.hessian(name).diagonal().cpu(), min(RANK, *w.shape))
            factors |= {f"{name}.left": found.left, f"{name}.right": found.right}
            corrected[name] = found.added_to(stored)
    return _with(kept(encoded, model, factors), corrected)


def _half_quadratic(model: Frozen, grid: Grid, embedding: Grid) -> Kept:
    """HQQ: codes and scales as in a file, real zero points beside it."""
    assert grid.bits is not None
    assert grid.group_size is not None
    stored_grid = replace(grid, range="full")
    encoded = []
    zeros, weights = {}, {}
    for item in plan_for(model, stored_grid, embedding).encode(model.weights):
        name = item.entry.name
        if name in model.matrices:
            found = hqq(model.weights[name].cpu(), grid.bits, grid.group_size)
            item = Encoded(item.entry, Codes(found.codes, found.scales))
            zeros[name], weights[name] = found.zeros, found.weights
        encoded.append(item)
    return _with(kept(encoded, model, zeros), weights)


def _smooth(model: Frozen, inputs: LayerInputs) -> Kept:
    """W8A8 simulated: int8 weights, and every nn.Linear of them reads int8 activations."""
    by_input: dict[int, list[str]] = {}
    for layer_name in model.inner_linears(model.module):
        name = f"{layer_name}.weight"
        by_input.setdefault(id(inputs.of[name].products), []).append(name)
    weights, scales = dict(model.weights), {}
    for names in by_input.values():
        found = migration_scales(inputs.of[names[0]].largest, [weights[n] for n in names])
        for name in names:
            weights[name], scales[name] = weights[name] * found, found
    made = _on_grid(model, weights, GRIDS["int8"], GRIDS["int8"], nearest)
    for name, layer in model.inner_linears(made.module).items():
        layer.register_forward_pre_hook(
            lambda _, inputs, scale=scales[f"{name}.weight"]: (
                snap_tokens(inputs[0] / scale.to(inputs[0].device)),
            )
        )
    beside = inner_bytes([scales[names[0]].half() for names in by_input.values()])
    return replace(
        made, disk_bytes=made.disk_bytes + beside, memory_bytes=made.memory_bytes + beside
    )


def file_variant(name: str, path: Path, model: Frozen) -> Variant:
    """A file of the same model, as QAT wrote it; a row with the reason if it cannot be read."""
    try:
        found = read_artifact(path)
    except UserError as error:
        return unmade(name, "qat", str(error))
    if found.weights.keys() != model.weights.keys():
        return unmade(name, "qat", f"{path} holds another model's tensors")

    def make() -> Kept:
        return replace(kept(found.encoded, model), disk_bytes=found.num_bytes)

    made_from = hashlib.sha256(path.read_bytes()).hexdigest()
    return Variant(name, "qat", make, made_from=made_from)


def grid_variants(model: Frozen) -> list[Variant]:
    """All rows of this file, cheapest to make first."""
    int8, g64 = GRIDS["int8"], GRIDS["int4_g64"]

    def train() -> LayerInputs:
        return model.inputs("train")

    def on(grid: Grid, embedding: Grid, method: Callable[[], Method]) -> Callable[[], Kept]:
        return lambda: _on_grid(model, model.weights, grid, embedding, method())

    rows = [
        Variant(dtype, "float", partial(_floats, model, dtype))
        for dtype in ("fp32", "bf16", "fp16")
    ]
    for name, grid in (GRIDS | CLIPS | SHIPPED).items():
        rows.append(Variant(f"rtn_{name}", "rounding", on(grid, grid, lambda: nearest)))
    rows.append(
        Variant("rtn_int6_lite", "rounding", on(GRIDS["int6"], GRIDS["int6"], lambda: lite))
    )
    rows.append(
        Variant(
            "rtn_int8_tensor_folded", "rounding", lambda: _folded(model, GRIDS["int8_tensor"]),
            lambda: None if hasattr(model.module, "folded")
            else f"{type(model.module).__name__} has no channel scales to fold",
        )
    )  # fmt: skip
    with_gptq = ("int6", "int5", "int4", "int4_g64", "int4_g128", "int4_h32", "int3", "ternary")
    for name in (*with_gptq, "mxfp4", "q4_0"):
        grid = (GRIDS | SHIPPED)[name]
        rows.append(Variant(f"gptq_{name}", "gptq", on(grid, grid, lambda: gptq(train()))))
    for name in ("int4", "int4_g64", "ternary"):
        grid = GRIDS[name]
        rows.append(Variant(f"rtn_{name}_e8", "rounding", on(grid, int8, lambda: nearest)))
        rows.append(Variant(f"gptq_{name}_e8", "gptq", on(grid, int8, lambda: gptq(train()))))
    rows += [
        Variant("gptq_plain_int4_g64_e8", "gptq",
                on(g64, int8, lambda: gptq(train(), act_order=False, by_inputs=False))),
        *(Variant(f"gptq_{kind}_int4_g64_e8", "gptq", partial(_calibrated, model, kind))
          for kind in model.texts if kind != "train"),
        Variant("gptq_sequential_int4_g64_e8", "gptq", lambda: _sequential(model, g64, int8)),
        Variant("awq_int4_e8", "scaled", on(GRIDS["int4"], int8, lambda: scaled(train()))),
        Variant("smoothquant_w8a8", "scaled", lambda: _smooth(model, train())),
        Variant("lqer_int4_g64_e8", "low rank", lambda: _low_rank(model, g64, int8, train())),
        Variant("hqq_int4_g64_e8", "scaled", lambda: _half_quadratic(model, g64, int8)),
    ]  # fmt: skip
    return rows
