"""torchao's post-training configurations, as it applies them to the matrices (see variant.py).

The weights become torchao's tensors, which bring their own products. Its inductor settings are
left alone: they are global, and would change how every other variant is computed.

``IntxWeightOnly`` holds a byte per weight whatever its bits are: its file is small because zstd
sees the empty bits, its memory is not.

The kernels of the variants for CUDA take bfloat16, so weights and activations are cast to it around
each product; the others compute in float32.

Left out: configurations that need calibration data or training, and ``IntxWeightOnly`` of 8 bits,
which is ``Int8WeightOnly`` again, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qat.cabinet.variant import (
    EMBEDDING,
    Frozen,
    Kept,
    Variant,
    coded_bytes,
    failure,
    held_tensors,
    inner_bytes,
)


@dataclass(frozen=True)
class Row:
    """A configuration, made from the module ``torchao`` (slow to import) on a device."""

    config: Callable[[Any, torch.device], Any]
    capability: tuple[int, int] | None = None  # of CUDA, at least; None: any device
    package: str | None = None  # needed beside torchao


def _int8_dynamic(ao: Any, device: torch.device) -> Any:
    """Seven bits on CPUs without VNNI, as torchao advises: sums of eight may overflow there."""
    return ao.quantization.Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False, reduce_range=ao.utils.should_reduce_range(device)
    )


def _int4_tinygemm(ao: Any, _: torch.device) -> Any:
    return ao.quantization.Int4WeightOnlyConfig(
        group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


ROWS = {
    "Int8WeightOnly": Row(
        lambda ao, _: ao.quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    ),
    "Int8DynamicActivationInt8Weight": Row(_int8_dynamic),
    "IntxWeightOnly int4 g32": Row(
        lambda ao, _: ao.quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]  # not in torch's stubs
            granularity=ao.quantization.PerGroup(32),
        )
    ),
    "Float8WeightOnly": Row(
        lambda ao, _: ao.quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    ),
    "Float8DynamicActivationFloat8Weight": Row(
        lambda ao, _: ao.quantization.Float8DynamicActivationFloat8WeightConfig(
            set_inductor_config=False
        ),
        capability=(8, 9),
    ),
    "Int4WeightOnly g32 (mslk)": Row(
        lambda ao, _: ao.quantization.Int4WeightOnlyConfig(
            group_size=32, set_inductor_config=False
        ),
        capability=(8, 0),
        package="mslk",
    ),
    "Int4WeightOnly g32 (tinygemm)": Row(_int4_tinygemm, capability=(8, 0)),
}


def torchao_variants(model: Frozen) -> list[Variant]:
    """One variant per configuration."""

    def make(row: Row) -> Kept:
        module = _converted(model, row)
        held = held_tensors(module)
        embedding = EMBEDDING if model.wiring.ends else None
        return Kept(module, coded_bytes(held), inner_bytes(held), embedding)

    def missing(row: Row) -> str | None:
        return _unmet(row, model.device) or failure(partial(_converted, model, row), model)

    return [
        Variant(f"torchao {name}", "torchao", partial(make, row), partial(missing, row))
        for name, row in ROWS.items()
    ]


def _converted(model: Frozen, row: Row) -> nn.Module:
    import torchao

    module = model.copy()
    layers = model.inner_linears(module)
    if row.capability is not None:
        for layer in layers.values():
            _compute_in_bfloat16(layer)
    chosen = set(layers.values())
    torchao.quantization.quantize_(
        module,
        row.config(torchao, model.device),
        filter_fn=lambda layer, _: layer in chosen,
    )
    for name, layer in layers.items():
        if not hasattr(layer.weight, "__tensor_flatten__"):  # torchao only logs what it skips
            raise ValueError(f"torchao does not quantize {name} {tuple(layer.weight.shape)}")
    return module


def _compute_in_bfloat16(layer: nn.Linear) -> None:
    layer.bfloat16()
    layer.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
    layer.register_forward_hook(lambda _, __, product: product.float())


def _unmet(row: Row, device: torch.device) -> str | None:
    if row.capability is not None:
        has = (0, 0) if device.type != "cuda" else torch.cuda.get_device_capability(device)
        if has < row.capability:
            return "needs CUDA capability >= {}.{}".format(*row.capability)
    if find_spec("torchao") is None:
        return "needs torchao: pip install -e '.[cabinet]'"
    if row.package is not None and find_spec(row.package) is None:
        return f"needs {row.package}"
    return None
