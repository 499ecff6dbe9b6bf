"""Variants on this project's grids: rounding by every rule, GPTQ, AWQ, LQER, SmoothQuant.

All matrices are on the grid that the name says; ``_e8`` keeps the embedding (and an untied head) at
int8 instead. Control vectors are fp32. Bytes are those of an artifact with the codes that the
variant has, coded by ``mix``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from qat.artifact.container import pack
from qat.cabinet.variant import Kept, Variant, inner_bytes, inner_linears
from qat.model.registry import architecture_of, model_of, tensor_shapes
from qat.model.spec import ModelSpec
from qat.model.wiring import wiring_of
from qat.ptq.calibration import read_inputs
from qat.ptq.hqq import hqq
from qat.ptq.layer_inputs import LayerInputs
from qat.ptq.lqer import lqer
from qat.ptq.methods import Method, encoded_by, gptq, lite, nearest, scaled
from qat.ptq.smoothquant import migration_scales, snap_tokens
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan, build_plan
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


class Frozen:
    """The model that all variants are made of, and what its matrices read of each kind of text.

    ``texts``: kind (train, self, random) -> what makes its (S, T) ids. Both are made once, when the
    first variant asks for them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        texts: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        self.spec, self.weights, self.texts = spec, weights, texts
        self._sequences: dict[str, Tensor] = {}
        self._inputs: dict[str, LayerInputs] = {}

    def sequences(self, kind: str) -> Tensor:
        if kind not in self._sequences:
            self._sequences[kind] = self.texts[kind]()
        return self._sequences[kind]

    def inputs(self, kind: str) -> LayerInputs:
        if kind not in self._inputs:
            self._inputs[kind] = read_inputs(self.spec, self.weights, self.sequences(kind))
        return self._inputs[kind]


def plan_for(spec: ModelSpec, grid: Grid, embedding: Grid) -> Plan:
    """Every matrix on ``grid``, embedding and head on theirs, vectors fp32."""
    wiring = wiring_of(spec)
    rules = dict.fromkeys(wiring.ends, "embedding") | dict.fromkeys(wiring.matrices, "grid")
    rules["*"] = "fp32"
    return build_plan(tensor_shapes(spec), {"grid": grid, "embedding": embedding}, rules)


def kept(encoded: list[Encoded], spec: ModelSpec, more: Mapping[str, Tensor] | None = None) -> Kept:
    """Weights and bytes of what a file stores; ``more``: beside it, raw, added to the bytes."""
    plan = Plan([item.entry for item in encoded])
    held = [t for item in encoded if item.coded for t in item.coded if t is not None]
    held += [item.plain for item in encoded if item.plain is not None]
    beside = list((more or {}).values())
    embedding = plan.entries[wiring_of(spec).ends[0]]
    return Kept(
        weights={item.entry.name: item.decode() for item in encoded},
        disk_bytes=len(pack(encoded, plan, {}, CODER)) + inner_bytes(beside),
        memory_bytes=inner_bytes([*held, *beside]),
        embedding=embedding.grid.label if embedding.grid else embedding.dtype,
    )


def _floats(model: Frozen, dtype: str) -> Kept:
    plan = Plan([Entry(name, tuple(w.shape), None, dtype) for name, w in model.weights.items()])
    made = kept(plan.encode(model.weights), model.spec)
    return replace(made, precision="bf16") if dtype == "bf16" else made


def _on_grid(
    spec: ModelSpec, weights: Mapping[str, Tensor], grid: Grid, embedding: Grid, method: Method
) -> Kept:
    return kept(encoded_by(plan_for(spec, grid, embedding), weights, method), spec)


def _folded(model: Frozen, grid: Grid) -> Kept:
    """Channel scales folded into the matrices beside them: what the model computes stays, and a
    scale per tensor sees other rows."""
    folded = architecture_of(model.spec).folded(model.weights)
    return _on_grid(model.spec, folded, grid, grid, nearest)


def _sequential(model: Frozen, grid: Grid, embedding: Grid, sequences: Tensor) -> Kept:
    """GPTQ block after block, each from what it reads once those before it are quantized."""
    plan = plan_for(model.spec, grid, embedding)
    weights = dict(model.weights)
    encoded = {item.entry.name: item for item in plan.encode(weights)}
    wiring = wiring_of(model.spec)
    for stage in (*wiring.blocks, *((name,) for name in wiring.ends)):
        method = gptq(read_inputs(model.spec, weights, sequences))
        part = Plan([plan.entries[name] for name in stage])
        for item in encoded_by(part, model.weights, method):
            encoded[item.entry.name] = item
            weights[item.entry.name] = item.decode().to(weights[item.entry.name].device)
    return kept(list(encoded.values()), model.spec)


def _low_rank(model: Frozen, grid: Grid, embedding: Grid, inputs: LayerInputs) -> Kept:
    wiring = wiring_of(model.spec)
    encoded = encoded_by(plan_for(model.spec, grid, embedding), model.weights, nearest)
    factors: dict[str, Tensor] = {}
    corrected = {}
    for item in encoded:
        name = item.entry.name
        if name in wiring.matrices:
            stored, w = item.decode(), model.weights[name].cpu()
            found = lqer(w, stored, inputs.hessian(name).diagonal().cpu(), min(RANK, *w.shape))
            factors |= {f"{name}.left": found.left, f"{name}.right": found.right}
            corrected[name] = found.added_to(stored)
    made = kept(encoded, model.spec, factors)
    return replace(made, weights=made.weights | corrected)


def _half_quadratic(model: Frozen, grid: Grid, embedding: Grid) -> Kept:
    """HQQ: codes and scales as in a file, real zero points beside it."""
    assert grid.bits is not None
    assert grid.group_size is not None
    wiring, stored_grid = wiring_of(model.spec), replace(grid, range="full")
    encoded = []
    zeros, weights = {}, {}
    for item in plan_for(model.spec, stored_grid, embedding).encode(model.weights):
        name = item.entry.name
        if name in wiring.matrices:
            found = hqq(model.weights[name].cpu(), grid.bits, grid.group_size)
            item = Encoded(item.entry, Codes(found.codes, found.scales))
            zeros[name], weights[name] = found.zeros, found.weights
        encoded.append(item)
    made = kept(encoded, model.spec, zeros)
    return replace(made, weights=made.weights | weights)


def _smooth(model: Frozen, inputs: LayerInputs) -> Kept:
    """W8A8 simulated: int8 weights, and every matrix of a block reads int8 activations."""
    by_input: dict[int, list[str]] = {}
    for name in inputs.wiring.matrices:
        by_input.setdefault(id(inputs.of[name].products), []).append(name)
    weights, scales = dict(model.weights), {}
    for names in by_input.values():
        found = migration_scales(inputs.of[names[0]].largest, [weights[n] for n in names])
        for name in names:
            weights[name], scales[name] = weights[name] * found, found
    made = _on_grid(model.spec, weights, GRIDS["int8"], GRIDS["int8"], nearest)
    module = model_of(model.spec)
    module.load_state_dict(made.weights)
    for name, layer in inner_linears(module, model.spec).items():
        layer.register_forward_pre_hook(
            lambda _, inputs, scale=scales[f"{name}.weight"]: (
                snap_tokens(inputs[0] / scale.to(inputs[0].device)),
            )
        )
    beside = inner_bytes([scales[names[0]].half() for names in by_input.values()])
    return replace(
        made, module=module, disk_bytes=made.disk_bytes + beside,
        memory_bytes=made.memory_bytes + beside,
    )  # fmt: skip


def grid_variants(model: Frozen) -> list[Variant]:
    """All rows of this file, cheapest to make first."""
    int8, g64 = GRIDS["int8"], GRIDS["int4_g64"]

    def train() -> LayerInputs:
        return model.inputs("train")

    def on(grid: Grid, embedding: Grid, method: Callable[[], Method]) -> Callable[[], Kept]:
        return lambda: _on_grid(model.spec, model.weights, grid, embedding, method())

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
            lambda: None if hasattr(architecture_of(model.spec), "folded")
            else f"{model.spec.name} has no channel scales to fold",
        )
    )  # fmt: skip
    with_gptq = ("int6", "int5", "int4", "int4_g64", "int4_g128", "int4_h32", "ternary")
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
        Variant("gptq_self_int4_g64_e8", "gptq", on(g64, int8, lambda: gptq(model.inputs("self")))),
        Variant("gptq_random_int4_g64_e8", "gptq",
                on(g64, int8, lambda: gptq(model.inputs("random")))),
        Variant("gptq_sequential_int4_g64_e8", "gptq",
                lambda: _sequential(model, g64, int8, model.sequences("train"))),
        Variant("awq_int4_e8", "scaled", on(GRIDS["int4"], int8, lambda: scaled(train()))),
        Variant("smoothquant_w8a8", "scaled", lambda: _smooth(model, train())),
        Variant("lqer_int4_g64_e8", "low rank", lambda: _low_rank(model, g64, int8, train())),
        Variant("hqq_int4_g64_e8", "scaled", lambda: _half_quadratic(model, g64, int8)),
    ]  # fmt: skip
    return rows
