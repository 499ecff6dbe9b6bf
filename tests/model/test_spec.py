"""What a file says of a model: few fields, and nothing that could import or build at will."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from qat.model.registry import model_of, tensor_shapes
from qat.model.spec import ModelSpec, architectures
from qat.settings.schema import ModelSettings
from qat.training.build import spec_of

SPEC = ModelSpec(64, 2, 32, 4, 2, 2, True)


def test_architectures_are_found_by_their_files() -> None:
    assert {"gpt", "llama"} <= set(architectures())
    assert not {"spec", "registry", "wiring", "losses", "attention"} & set(architectures())


@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, name="llama"), replace(SPEC, name="llama", more={"mlp_dim": 9})]
)
def test_json_round_trip(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.as_json()) == spec
    assert {spec: 1}[ModelSpec.from_json(spec.as_json())] == 1


def test_the_baselines_header_is_that_of_files_before_there_were_others() -> None:
    assert list(SPEC.as_json()) == [
        "vocab_size", "num_layers", "dim", "num_heads", "num_kv_heads", "mlp_mult",
        "tie_embeddings",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": "losses"}, {"name": "os"}, {"name": "../gpt"}, {"name": "gpt.GPT"}, {"name": ""},
        {"name": ["gpt"]}, {"name": None}, {"more": []}, {"more": {"mlp_dim": "9"}},
        {"more": {"mlp_dim": True}}, {"more": None}, {"dim": 0}, {"dim": 8.0}, {"dim": True},
        {"tie_embeddings": 1}, {"depth": 3},
    ],
    ids=str,
)  # fmt: skip
def test_forged_specs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        ModelSpec.from_json(SPEC.as_json() | change)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gpt", {"mlp_dim": 9}, "more.mlp_dim: gpt has no such size; it has none"),
        ("llama", {"width": 9}, "more.width: llama has no such size; it has mlp_dim, rope_base"),
        ("llama", {"mlp_dim": 9.5}, "more.mlp_dim = 9.5: give a whole number above 0"),
        ("llama", {"mlp_dim": 0}, "more.mlp_dim = 0: give a whole number"),
        ("llama", {"norm_eps": -1.0}, "more.norm_eps = -1.0: give a number above 0"),
        ("llama", {"rope_base": float("nan")}, "more.rope_base = nan: give a number"),
        ("llama", {"rope_base": float("inf")}, "more.rope_base = inf: give a number"),
        ("mamba", {}, "name = mamba: choose from gpt"),
    ],
)
def test_sizes_of_one_architecture(name: str, more: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(replace(SPEC, name=name, more=more))


def test_more_tensors_than_allowed_are_never_built() -> None:
    shapes = tensor_shapes(SPEC)
    assert tensor_shapes(SPEC, max_tensors=len(shapes)) == shapes
    with pytest.raises(ValueError, match=f"more than {len(shapes) - 1} tensors"):
        tensor_shapes(SPEC, max_tensors=len(shapes) - 1)
    with pytest.raises(ValueError, match="more than 50 tensors"):
        tensor_shapes(replace(SPEC, num_layers=10**9), max_tensors=50)


def test_settings_are_the_spec_and_where_to_begin() -> None:
    assert [f.name for f in fields(ModelSettings)] == [
        *(f.name for f in fields(ModelSpec)), "init_from",
    ]  # fmt: skip
    assert spec_of(ModelSettings(64, 2, 32, 4, 2, 2, init_from="a.pt")) == SPEC
    with pytest.raises(FrozenInstanceError):
        SPEC.dim = 3
