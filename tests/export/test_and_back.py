"""``model.init_from``: what is exported comes back as the same bits, and the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.evaluation.open_model import OpenedModel
from qat.export.hugging_face import write_folder
from qat.export.plain_tensors import write_tensors
from qat.golf.bundle import code_files
from qat.model.registry import model_of
from qat.model.spec import ModelSpec
from qat.settings import arguments
from qat.settings.arguments import with_source
from qat.settings.schema import DataSettings, ModelSettings
from qat.text.tokenizer import Tokenizer
from qat.training.build import build_model
from qat.training.llama_config import spec_at
from tests.conftest import GOLF, result_of
from tests.export.conftest import SPEC, untied

Stored = Callable[..., OpenedModel]


def settings(path: Path, spec: ModelSpec = SPEC, **changes) -> ModelSettings:
    return ModelSettings(**vars(spec) | changes, init_from=str(path))


def refused(path: Path, spec: ModelSpec = SPEC, **changes) -> str:
    with pytest.raises(UserError) as caught:
        build_model(settings(path, spec, **changes), 1)
    start = f"model.init_from={path}: not weights of this model ("
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)[:-1]


@pytest.fixture
def folder(stored: Stored, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_folder(tmp_path / "hf", stored(), tokenizer)
    return tmp_path / "hf"


@pytest.mark.parametrize("spec", [SPEC, untied(), ModelSpec(320, 2, 64, 4, 2, 2)], ids=str)
def test_the_same_bits_come_back(
    spec: ModelSpec, stored: Stored, tokenizer: Tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    opened = stored(spec)
    write_tensors(tmp_path / "m.safetensors", opened)
    paths = [tmp_path / "m.safetensors"]
    if spec.name == "llama":
        write_folder(tmp_path / "hf", opened, tokenizer)
        paths.append(tmp_path / "hf")
    for path in paths:
        for name, w in build_model(settings(path, spec), 1).state_dict().items():
            expected = opened.artifact.weights[name]
            assert torch.equal(w.view(torch.int32), expected.view(torch.int32)), name


def test_a_folder_that_transformers_writes(tmp_path: Path) -> None:
    """In parts, in bfloat16, with a head that is tied and stored all the same."""
    weights = {n: w.detach().bfloat16() for n, w in model_of(SPEC).named_parameters()}
    name = "model.embed_tokens.weight"
    weights |= {"lm_head.weight": weights[name].clone()}
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for part in set(places.values()):
        save_file({n: w for n, w in weights.items() if places[n] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
              "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, w in build_model(settings(tmp_path), 1).state_dict().items():
        assert torch.equal(w, weights[name].float()), name
    index.write_text(json.dumps({"weight_map": {"w": "../model.safetensors"}}))
    assert refused(tmp_path) == "its index names '../model.safetensors', which is not in it"
    for damaged in ("[]", "{}", '{"weight_map": {"w": 3}}', '{"weight_map": 3}'):
        index.write_text(damaged)
        assert refused(tmp_path) == "its model.safetensors.index.json names no files"
    index.write_text("{")
    assert refused(tmp_path).startswith("Expecting property name")
    index.write_text("[" * 100_000)
    assert refused(tmp_path) == "it is nested too deep"


DAMAGED = ("", "[]", "3", "{}", "{", "[" * 100_000, '{"model_type": "llama"}', "\udc80")
WRONG = ({"num_attention_heads": 0}, {"hidden_size": "64"}, {"rope_parameters": [1]},
         {"rope_theta": 10**400}, {"rms_norm_eps": None}, {"vocab_size": 1.5})  # fmt: skip


def test_what_describes_no_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert spec_at(tmp_path) is not None
    for text in (*DAMAGED, *(json.dumps(config | wrong) for wrong in WRONG)):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"\w"):
            spec_at(tmp_path)


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    def written(header: bytes, size: int | None = None) -> Path:
        length = len(header) if size is None else size
        path.write_bytes(length.to_bytes(8, "little") + header)
        return path

    assert spec_at(written(b"{}")) is None
    assert spec_at(written(b'{"__metadata__": {"format": "pt"}}')) is None
    for header, size in (
        (b"", None), (b"[]", None), (b"{", None), (b"{}", 1 << 60), (b"[" * 100_000, None),
        (b'{"__metadata__": 3}', None), (b'{"__metadata__": {"model": 3}}', None),
        (b'{"__metadata__": {"model": "3"}}', None), (b"\x80", None),
        (b'{"__metadata__": {"model": "{\\"dim\\": 3}"}}', None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            spec_at(written(header, size))
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        spec_at(path)


def test_why_it_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    for changed, reason in (
        (weights | {name: weights[name][:9].clone()}, f"{name} is (9, 64), in the model (32, 64)"),
        (weights | {name: weights[name] * torch.inf}, f"{name} is not finite"),
        ({key: w for key, w in weights.items() if key != name}, f"it has no {name}"),
        (weights | {"more": weights[name].clone()}, "the model has no more"),
        (weights | {name: weights[name].char()}, f"{name} is of torch.int8, no float"),
    ):
        save_file(changed, folder / "model.safetensors")
        assert refused(folder) == reason
    (folder / "model.safetensors").write_bytes(b"no tensors at all")
    assert refused(folder).startswith("model.safetensors: ")
    (folder / "model.safetensors").unlink()
    assert (
        refused(folder)
        == "it is no run, and has neither model.safetensors nor model.safetensors.index.json"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 96, "num_heads": 6, "num_kv_heads": 3},
         "model.embed_tokens.weight is (320, 64), in the model (320, 96)"),
        ({"vocab_size": 400}, "model.embed_tokens.weight is (320, 64), in the model (400, 64)"),
        ({"num_layers": 3}, "it has no model.layers.2.input_layernorm.weight"),
        ({"num_layers": 1}, "the model has no model.layers.1.input_layernorm.weight"),
        ({"tie_embeddings": False}, "it has no lm_head.weight"),
        ({"mlp_mult": 6}, "model.layers.0.mlp.gate_proj.weight is (128, 64), in the model (256"),
        ({"num_heads": 8, "num_kv_heads": 4}, "its num_heads is 4, in the model 8"),
        ({"more": {"rope_base": 5e5}}, "its rope_base is 10000.0, in the model 500000.0"),
        ({"more": {"norm_eps": 1e-5}}, "its norm_eps is 1e-06, in the model 1e-05"),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_others(changes: dict, reason: str, folder: Path) -> None:
    """What no tensor shows too."""
    assert refused(folder, **changes).startswith(reason)


def test_sizes_are_taken_from_it_but_for_those_typed(folder: Path) -> None:
    def added(*typed: str) -> set[str]:
        asked = [f"model.init_from={folder}", *typed]
        found = with_source(asked, asked)
        assert found[: len(asked)] == asked
        return set(found[len(asked) :])

    sizes = {
        "model.name=llama", "model.vocab_size=320", "model.num_layers=2", "model.dim=64",
        "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_mult=1",
        "model.tie_embeddings=true",
    }  # fmt: skip
    more = {"model.more.mlp_dim=128", "model.more.rope_base=10000.0", "model.more.norm_eps=1e-06"}
    assert added() == sizes | more
    assert added("model.dim=96") == (sizes | more) - {"model.dim=64"}
    assert added("model.mlp_mult=6") == (sizes | more) - {
        "model.mlp_mult=1", "model.more.mlp_dim=128",
    }  # fmt: skip
    assert added("++model.more.norm_eps=0.1") == (sizes | more) - {"model.more.norm_eps=1e-06"}
    assert added("model=llama_4x288") == set()
    assert with_source(["model.init_from=w.pt"], ["model.init_from=w.pt"]) == [
        "model.init_from=w.pt"
    ]
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    line = f"model.init_from={folder}: its model_type is 'qwen2', and this Llama's llama"
    with pytest.raises(UserError, match=re.escape(line)):
        added()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"No such file or directory: '.*config.json'"):
        added()


def test_a_runs_data_is_taken_from_it(tmp_path: Path) -> None:
    """With what a path may hold; not if other data was typed."""
    asked = [f"model.init_from={tmp_path}", "model=llama_4x288"]
    files = ["/it's here/a b.txt", "/c,d=[e]/$f\\g.txt"]
    said = asdict(DataSettings(source="text", files=files, val_fraction=0.125))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": said}))
    added = with_source(asked, asked)[2:]
    found = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(added)}
    assert found == {f"data.{k}": v for k, v in said.items() if k != "cache_dir"}
    for typed in ("data=web_bible", "data.files=[a.txt]"):
        assert with_source([*asked, typed], [*asked, typed]) == [*asked, typed]
    (tmp_path / "config.yaml").write_text("data: 3")
    with pytest.raises(UserError, match=r"its config.yaml is damaged \(TypeError"):
        with_source(asked, asked)


@pytest.mark.slow
def test_trained_on(finished: Path, folder: Path, train, program) -> None:
    """The first loss is that of the stored model; of another tokenizer's there is none."""
    done = program("eval.py", "task=export", f"run={finished}", "out=m.safetensors")
    assert done.code == 0, done.err
    done = train("model.init_from=m.safetensors", "max_steps=1", "run_name=r", "qat=none")
    assert done.code == 0, done.err
    before, row = result_of(finished), result_of(Path("logs/runs/r"))
    assert abs(row["train_loss"] - before["val_loss_artifact"]) < 0.3 < before["train_loss"]
    done = train("model.init_from=hf", "max_steps=1", "run_name=s")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "model.init_from=hf: trained with another tokenizer than " in done.err


def test_its_tokenizer_is_the_texts(folder: Path, tokenizer: Tokenizer) -> None:
    build_model(settings(folder), 1, tokenizer)
    with pytest.raises(UserError, match="trained with another tokenizer than"):
        build_model(settings(folder), 1, Tokenizer(GOLF / "tokenizer.model"))


def test_a_submission_has_no_code_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {path.name for path in code_files()}
    assert not counted & {"initial_weights.py", "llama_config.py", "hugging_face.py"}
    monkeypatch.setattr(arguments, "SOURCE", "qat.model.not_there")
    asked = [f"model.init_from={folder}"]
    with pytest.raises(UserError, match=r"train_gpt\.py begins from random weights"):
        with_source(asked, asked)
