"""Variants on this project's grids: rounding by every rule, GPTQ, AWQ, LQER, SmoothQuant.

All matrices are on the grid that the name says; ``_e8`` keeps the embedding (and an untied head) at
int8 instead. Control vectors are fp32. Bytes are those of an artifact with the codes that the
variant has, coded by ``mix``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qat.artifact.container import pack
from qat.cabinet.variant import Kept, Variant, inner_bytes
from qat.model.gpt import GPT, GPTShape, tensor_shapes
from qat.ptq.calibration import read_inputs
from qat.ptq.hqq import hqq
from qat.ptq.layer_inputs import EMBEDDING, HEAD, LayerInputs
from qat.ptq.lqer import lqer
from qat.ptq.methods import Method, encoded_by, gptq, lite, nearest, scaled
from qat.ptq.smoothquant import migration_scales, snap_tokens
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan, build_plan
from qat.quantize.rounding import Codes

CODER = "mix"
RANK = 16  # of LQER's factors
GRIDS = {
    "int8_tensor": Grid(bits=8, per_tensor=True),
    "int8": Grid(bits=8),
    "int6": Grid(bits=6),
    "int5": Grid(bits=5),
    "int4": Grid(bits=4),
    "int4_g64": Grid(bits=4, group_size=64),
    "int4_g128": Grid(bits=4, group_size=128),
    "ternary": Grid(levels="ternary", scale_rule="absmean", refit=True),
}
CLIPS = {
    "int6_percentile": Grid(bits=6, scale_rule="percentile", percentile=0.999),
    "int6_sdclip": Grid(bits=6, scale_rule="sigma"),
    "int6_mse": Grid(bits=6, scale_rule="mse"),
    "int4_mse": Grid(bits=4, scale_rule="mse"),
}
RULES = {"*_scale": "fp32", "*.resid_mix": "fp32", "*.q_gain": "fp32", "skip_weights": "fp32"}


class Frozen:
    """The model that all variants are made of, and what its matrices read of each kind of text.

    ``texts``: kind (train, self, random) -> what makes its (S, T) ids. Both are made once, when the
    first variant asks for them.
    """

    def __init__(
        self,
        shape: GPTShape,
        weights: dict[str, Tensor],
        texts: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        self.shape, self.weights, self.texts = shape, weights, texts
        self._sequences: dict[str, Tensor] = {}
        self._inputs: dict[str, LayerInputs] = {}

    def sequences(self, kind: str) -> Tensor:
        if kind not in self._sequences:
            self._sequences[kind] = self.texts[kind]()
        return self._sequences[kind]

    def inputs(self, kind: str) -> LayerInputs:
        if kind not in self._inputs:
            self._inputs[kind] = read_inputs(self.shape, self.weights, self.sequences(kind))
        return self._inputs[kind]


def plan_for(shape: GPTShape, grid: Grid, embedding: Grid) -> Plan:
    """Every matrix on ``grid``, embedding and head on theirs, vectors fp32."""
    rules = RULES | {EMBEDDING: "embedding", HEAD: "embedding", "*.weight": "grid"}
    return build_plan(tensor_shapes(shape), {"grid": grid, "embedding": embedding}, rules)


def kept(encoded: list[Encoded], more: Mapping[str, Tensor] | None = None) -> Kept:
    """Weights and bytes of what a file stores; ``more``: beside it, raw, added to the bytes."""
    plan = Plan([item.entry for item in encoded])
    held = [t for item in encoded if item.coded for t in item.coded if t is not None]
    held += [item.plain for item in encoded if item.plain is not None]
    beside = list((more or {}).values())
    embedding = plan.entries[EMBEDDING].grid
    return Kept(
        weights={item.entry.name: item.decode() for item in encoded},
        disk_bytes=len(pack(encoded, plan, {}, CODER)) + inner_bytes(beside),
        memory_bytes=inner_bytes([*held, *beside]),
        embedding=embedding.label if embedding else plan.entries[EMBEDDING].dtype,
    )


def _floats(model: Frozen, dtype: str) -> Kept:
    plan = Plan([Entry(name, tuple(w.shape), None, dtype) for name, w in model.weights.items()])
    made = kept(plan.encode(model.weights))
    return replace(made, precision="bf16") if dtype == "bf16" else made


def _on_grid(
    shape: GPTShape, weights: Mapping[str, Tensor], grid: Grid, embedding: Grid, method: Method
) -> Kept:
    return kept(encoded_by(plan_for(shape, grid, embedding), weights, method))


def _folded(model: Frozen, grid: Grid) -> Kept:
    """Channel scales of a block's outputs folded into the rows of the matrices before them: what
    the model computes stays, and a scale per tensor sees other rows."""
    weights = dict(model.weights)
    for name in model.weights:
        for kind in ("attn", "mlp"):
            if name.endswith(f".{kind}_scale"):
                matrix = name.removesuffix(f"{kind}_scale") + f"{kind}.proj.weight"
                weights[matrix] = weights[matrix] * weights[name][:, None]
                weights[name] = torch.ones_like(weights[name])
    return _on_grid(model.shape, weights, grid, grid, nearest)


def _sequential(model: Frozen, grid: Grid, embedding: Grid, sequences: Tensor) -> Kept:
    """GPTQ block after block, each from what it reads once those before it are quantized."""
    plan = plan_for(model.shape, grid, embedding)
    weights = dict(model.weights)
    encoded = {item.entry.name: item for item in plan.encode(weights)}
    stages = [f"blocks.{i}." for i in range(model.shape.num_layers)] + ["tok_emb", "lm_head"]
    for stage in stages:
        names = [name for name, item in encoded.items() if name.startswith(stage) and item.coded]
        if not names:
            continue
        method = gptq(read_inputs(model.shape, weights, sequences))
        part = Plan([plan.entries[name] for name in names])
        for item in encoded_by(part, model.weights, method):
            encoded[item.entry.name] = item
            weights[item.entry.name] = item.decode().to(weights[item.entry.name].device)
    return kept(list(encoded.values()))


def _low_rank(model: Frozen, grid: Grid, embedding: Grid, inputs: LayerInputs) -> Kept:
    encoded = encoded_by(plan_for(model.shape, grid, embedding), model.weights, nearest)
    factors: dict[str, Tensor] = {}
    corrected = {}
    for item in encoded:
        name = item.entry.name
        if item.coded is not None and name not in (EMBEDDING, HEAD):
            stored, w = item.decode(), model.weights[name].cpu()
            found = lqer(w, stored, inputs.hessian(name).diagonal().cpu(), RANK)
            factors |= {f"{name}.left": found.left, f"{name}.right": found.right}
            corrected[name] = found.added_to(stored)
    made = kept(encoded, factors)
    return replace(made, weights=made.weights | corrected)


def _half_quadratic(model: Frozen, grid: Grid, embedding: Grid) -> Kept:
    """HQQ: codes and scales as in a file, real zero points beside it."""
    assert grid.bits is not None
    assert grid.group_size is not None
    stored_grid = replace(grid, range="full")
    encoded = []
    zeros, weights = {}, {}
    for item in plan_for(model.shape, stored_grid, embedding).encode(model.weights):
        name = item.entry.name
        if item.coded is not None and name not in (EMBEDDING, HEAD):
            found = hqq(model.weights[name].cpu(), grid.bits, grid.group_size)
            item = Encoded(item.entry, Codes(found.codes, found.scales))
            zeros[name], weights[name] = found.zeros, found.weights
        encoded.append(item)
    made = kept(encoded, zeros)
    return replace(made, weights=made.weights | weights)


def _smooth(model: Frozen, inputs: LayerInputs) -> Kept:
    """W8A8 simulated: int8 weights, and every matrix of a block reads int8 activations."""
    by_input: dict[int, list[str]] = {}
    for name, seen in inputs.of.items():
        if name != HEAD:
            by_input.setdefault(id(seen.products), []).append(name)
    weights, scales = dict(model.weights), {}
    for names in by_input.values():
        found = migration_scales(inputs.of[names[0]].largest, [weights[n] for n in names])
        for name in names:
            weights[name], scales[name] = weights[name] * found, found
    made = _on_grid(model.shape, weights, GRIDS["int8"], GRIDS["int8"], nearest)
    module = GPT(model.shape)
    module.load_state_dict(made.weights)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
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
        return lambda: _on_grid(model.shape, model.weights, grid, embedding, method())

    rows = [
        Variant(dtype, "float", partial(_floats, model, dtype))
        for dtype in ("fp32", "bf16", "fp16")
    ]
    for name, grid in (GRIDS | CLIPS).items():
        rows.append(Variant(f"rtn_{name}", "rounding", on(grid, grid, lambda: nearest)))
    rows.append(
        Variant("rtn_int6_lite", "rounding", on(GRIDS["int6"], GRIDS["int6"], lambda: lite))
    )
    rows.append(
        Variant("rtn_int8_tensor_folded", "rounding", lambda: _folded(model, GRIDS["int8_tensor"]))
    )
    for name in ("int6", "int5", "int4", "int4_g64", "int4_g128", "ternary"):
        grid = GRIDS[name]
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
