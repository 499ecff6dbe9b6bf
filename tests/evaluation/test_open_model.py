"""Opening what a header names: forged headers are refused, the split is the one trained with."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from qat.artifact.container import HASH_BYTES, PREFIX, read_artifact
from qat.errors import UserError
from qat.evaluation.open_model import open_artifact
from tests.conftest import result_of


def with_meta(file: bytes, meta: dict) -> bytes:
    """The same file with other ``meta`` entries and a right hash."""
    magic, version, size = PREFIX.unpack_from(file)
    header = json.loads(file[PREFIX.size : PREFIX.size + size])
    header["meta"] |= meta
    if header["meta"]["data"] == "absent":
        del header["meta"]["data"]
    raw = json.dumps(header).encode()
    rest = file[PREFIX.size + size : -HASH_BYTES]
    body = PREFIX.pack(magic, version, len(raw)) + raw + rest
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "meta",
    [
        {"seq_len": 0},
        {"seq_len": -5},
        {"seq_len": 2**40},
        {"seq_len": "32"},
        {"data": "abc"},
        {"data": "absent"},
        {"data": {"name": "web_bible", "val_fraction": 7}},
        {"data": {"name": "web_bible", "val_fraction": "x"}},
        {"data": {"name": "hub"}},
        {"data": {"cache_key": "../../etc"}},
        {"data": {"name": ["web_bible"]}},
        {"tokenizer_sha256": None},
        {"model": []},
        {"model": {}},
        {"model": {"dim": 64}},
    ],
    ids=str,
)
def test_forged_meta(meta: dict, finished: Path, program, tmp_path: Path) -> None:
    (tmp_path / "f.qat").write_bytes(with_meta((finished / "artifact.qat").read_bytes(), meta))
    done = program("eval.py", "artifact=f.qat")
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_text_given_by_hand_is_split_as_in_training(train, program, corpus, cache_dir) -> None:
    """Another split would score documents that were trained on."""
    assert train("data.val_fraction=0.2", "run_name=r", "max_steps=1").code == 0
    done = program(
        "eval.py", "artifact=logs/runs/r/artifact.qat", f"data.files=[{corpus}]",
        f"data.cache_dir={cache_dir}", "eval.batch_tokens=2048",
    )  # fmt: skip
    assert done.code == 0, done.err
    match = re.search(r"^val_bpb\s+(\S+)$", done.out, re.MULTILINE)
    assert match
    expected = result_of(Path("logs/runs/r"))["val_bpb_artifact"]
    assert float(match[1]) == pytest.approx(expected, abs=1e-9)


def test_another_tokenizer(finished: Path, program, cache_dir: Path, tmp_path: Path) -> None:
    good = (finished / "artifact.qat").read_bytes()
    (tmp_path / "f.qat").write_bytes(with_meta(good, {"tokenizer_sha256": "0" * 64}))
    done = program("eval.py", "artifact=f.qat", f"data.cache_dir={cache_dir}")
    assert done.code == 2
    assert re.fullmatch(
        r"error: data\.tokenizer=\S+: not the tokenizer this artifact was trained with; .*\n",
        done.err,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 20_000),  # fits its largest tensor, and would take minutes to build
        ("num_layers", 3),
        ("num_layers", 1),
        ("num_layers", -2),
        ("num_layers", 2.0),
        ("num_layers", "2"),
        ("num_heads", 0),
        ("num_heads", 3),
        ("num_heads", -4),
        ("dim", 10**18),
        ("dim", 32),
        ("vocab_size", 10**15),
        ("mlp_mult", 0),
        ("tie_embeddings", False),
        ("tie_embeddings", "no"),
        ("depth", 1),
        ("name", "llama"),
        ("name", "losses"),
        ("name", "../model/gpt"),
        ("name", ["gpt"]),
        ("more", {"mlp_dim": 64}),
        ("more", "mlp_dim"),
    ],
)
def test_a_model_that_its_tensors_are_not(
    field: str, value: object, finished: Path, tmp_path: Path
) -> None:
    good = finished / "artifact.qat"
    model = read_artifact(good).meta["model"] | {field: value}
    path = tmp_path / "f.qat"
    path.write_bytes(with_meta(good.read_bytes(), {"model": model}))
    with pytest.raises(UserError) as caught:
        open_artifact(path)
    assert re.fullmatch(rf"artifact={path}: its (tensors|header) .*", str(caught.value))


@pytest.mark.slow
def test_a_run_brings_its_text_along(train, program, prepared_text: Path, tmp_path: Path) -> None:
    """Its own cache, wherever it is asked from; and shards that were given."""
    assert train("run_name=own", "max_steps=1", "data.cache_dir=ca").code == 0
    shards = (
        "data.files=null", f"data.train_files={prepared_text}/train_*.bin",
        f"data.val_files={prepared_text}/val_*.bin",
        f"data.tokenizer={prepared_text}/tokenizer.model",
    )  # fmt: skip
    assert train("run_name=given", "max_steps=1", *shards).code == 0
    for name in ("own", "given"):
        done = program("eval.py", f"run={tmp_path}/logs/runs/{name}")
        assert done.code == 0, done.err
        bpb = result_of(tmp_path / "logs" / "runs" / name)["val_bpb_artifact"]
        printed = re.search(r"val_bpb +(\S+)", done.out)
        assert printed is not None
        assert float(printed[1]) == pytest.approx(bpb, abs=1e-5)
