"""``eval.py task=export``: what is written, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qat.artifact.container import pack, read_artifact, write_whole
from qat.export import export_task, gguf_file
from qat.model.spec import ModelSpec
from qat.quantize.plan import Encoded
from qat.settings.checks import FILES
from qat.text.tokenizer import Tokenizer
from tests.conftest import GOLF


@pytest.fixture
def text(tokenizer: Tokenizer) -> str:
    return f"data.tokenizer={tokenizer.path}"


def test_plain_tensors_of_any_model(finished: Path, program, tmp_path: Path) -> None:
    """The baseline's here: its U-net has no other file."""
    done = program("eval.py", "task=export", f"run={finished}", "out=m.safetensors")
    assert (done.code, done.err) == (0, "")
    artifact = read_artifact(finished / "artifact.qat")
    assert done.out == (
        f"file           m.safetensors\ntensors        {len(artifact.weights)} F32, the artifact's "
        "bits\n"
    )
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        meta = file.metadata()
        assert set(file.keys()) == set(artifact.weights)
        for name, w in artifact.weights.items():
            found = file.get_tensor(name)
            assert torch.equal(found.flatten().view(torch.int32), w.flatten().view(torch.int32))
    assert ModelSpec.from_json(json.loads(meta["model"])) == ModelSpec(320, 2, 64, 4, 2, 2)
    assert meta["tokenizer_sha256"] == artifact.meta["tokenizer_sha256"]
    assert (meta["grid"], meta["seq_len"], meta["format"]) == ("int6", "32", "pt")


def test_a_llama_as_every_kind(stored, program, text, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf (export)")
    stored()
    for out in ("m.gguf", "m/", "m.safetensors"):
        done = program("eval.py", "task=export", "artifact=a.qat", f"out={out}", text)
        assert done.code == 0, done.err
        assert done.out.startswith(f"file           {out.rstrip('/')}\n")
    names = {"a.qat", "m.gguf", "m", "m.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("artifact=a.qat",),
            "out = null: give one of FILE.gguf, FILE.safetensors, FILE.ptz, or D",
        ),
        (("artifact=a.qat", "out=m.onnx"), "out = m.onnx: give one of FILE.gguf, FILE.safetensors"),
        (("out=m.gguf",), "artifact = null: give artifact=PATH or run=RUN"),
        (("artifact=a.qat", "out=a.qat/"), "out=a.qat/: it is there already; give another name"),
        (("artifact=a.qat", "out=old.gguf"), "out=old.gguf: it is there already; give another"),
        (("artifact=a.qat", "out=empty/"), "out=empty/: it is there already; give another name"),
        (("artifact=a.qat", "out=gone.gguf"), "out=gone.gguf: it is there already"),
        (("artifact=a.qat", "out=no/m.gguf"), "out=no/m.gguf: No such file or directory: no"),
        (("artifact=a.qat", "out=old.gguf/m/"), "out=old.gguf/m/: No such file or directory"),
        (("artifact=b.qat", "out=m.gguf"), "artifact=b.qat: No such file or directory"),
        (("run=empty", "out=m.gguf"), "run=empty: empty holds no artifact; did the run finish?"),
        (
            ("artifact=a.qat", "out=m/", f"data.tokenizer={GOLF}/tokenizer.model"),
            "/tokenizer.model: not the tokenizer this artifact was trained with",
        ),
        (("artifact=a.qat", "out=m.ptz"), "a .ptz file: its model is a llama; the challenge's"),
    ],
    ids=str,
)
def test_mistakes(
    arguments: tuple[str, ...], line: str, stored, program, text, tmp_path: Path
) -> None:
    stored()
    (tmp_path / "old.gguf").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.gguf").symlink_to("nowhere")
    before = {path.name for path in tmp_path.iterdir()}
    asked = () if any(a.startswith("data.") for a in arguments) else (text,)
    done = program("eval.py", "task=export", *arguments, *asked)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert line in done.err
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "old.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize("out", ["m.gguf", "m"])
def test_the_baseline_is_no_llama(out: str, finished: Path, program) -> None:
    done = program("eval.py", "task=export", f"run={finished}", f"out={out}")
    file = "a .gguf file" if "." in out else "a folder of Hugging Face's"
    reader = "llama.cpp" if "." in out else "Hugging Face"
    assert (done.code, done.err) == (
        2,
        f"error: artifact={finished}/artifact.qat: cannot become {file}: its model is a gpt, of "
        f"which {reader} knows nothing; give out=FILE.safetensors\n",
    )


def test_weights_that_are_not_finite(stored, program, text, tmp_path: Path) -> None:
    """Such a file cannot come from here: nothing is stored that is not finite."""
    opened = stored()
    broken = [
        Encoded(item.entry, item.coded, torch.full_like(item.plain, torch.nan))
        if item.plain is not None
        else item
        for item in opened.artifact.encoded
    ]
    data = pack(broken, opened.artifact.plan, opened.artifact.meta, "zstd")
    write_whole(tmp_path / "nan.qat", data)
    for out in ("m.gguf", "m/", "m.safetensors"):
        done = program("eval.py", "task=export", "artifact=nan.qat", f"out={out}", text)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert "has a value that is not finite" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"a.qat", "nan.qat"}


@pytest.mark.parametrize("out", ["m.gguf", "m", "m.safetensors"])
def test_a_full_disk_leaves_nothing(
    out: str, stored, program, text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    stored()
    monkeypatch.setattr("os.fsync", full)
    done = program("eval.py", "task=export", "artifact=a.qat", f"out={out}", text)
    assert (done.code, done.err) == (2, f"error: out={out}: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.qat"]


def test_a_file_that_is_no_proof_gets_no_name(
    stored, program, text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="needs gguf (export)")
    stored()
    pack_blocks = gguf_file.gguf_tensor

    def damaged(item, rows=None):
        kind, data = pack_blocks(item, rows)
        return kind, data[::-1].copy()

    monkeypatch.setattr(gguf_file, "gguf_tensor", damaged)
    done = program("eval.py", "task=export", "artifact=a.qat", "out=m.gguf", text)
    assert done.code == 2
    assert "cannot become a .gguf file: tensor " in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.qat"]


def test_what_is_not_installed_is_said(
    stored, program, text, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored()
    monkeypatch.setattr(export_task, "find_spec", lambda name: None)
    done = program("eval.py", "task=export", "artifact=a.qat", "out=m.gguf", text)
    assert done.err == "error: out=m.gguf: needs gguf: pip install -e '.[export]'\n"


def test_kinds_are_those_that_the_settings_know() -> None:
    assert set(export_task.NEEDS) | {".ptz"} == {*FILES, ""}
