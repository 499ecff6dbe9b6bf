"""The challenge's file scored, its model found out from its tensors, and ours written as one."""

from __future__ import annotations

import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.artifact.container import pack, read_artifact, write_whole
from qat.evaluation.open_model import artifact_meta
from qat.golf.bundle import ROOT, count_code_bytes
from qat.golf.ptz_file import GOLF_GRID, pack_golf, read_golf_file
from qat.golf.ptz_model import spec_from
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan, build_plan
from tests.conftest import GOLF, result_of
from tests.golf.test_ptz_file import minimal_reader

FIXTURE = GOLF / "final_model.int8.ptz"
TEXT = (f"data.val_files={GOLF}/fineweb_val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model")
GOLF_SHAPE = ModelSpec(512, 3, 320, 5, 1, 3, False)
RULES = yaml.safe_load((ROOT / "conf/plan/matrices.yaml").read_text())["rules"]
MIN_ELEMENTS = yaml.safe_load((ROOT / "conf/plan/golf.yaml").read_text())["grid_min_elements"]


def value(text: str, key: str) -> float:
    match = re.search(rf"^{key}\s+(\S+)$", text, re.MULTILINE)
    assert match, text
    return float(match[1])


def plan_of(shape: ModelSpec, grid: Grid = GOLF_GRID, min_elements: int = MIN_ELEMENTS) -> Plan:
    return build_plan(tensor_shapes(shape), {"grid": grid}, RULES, min_elements)


def random_weights(shape: ModelSpec) -> dict[str, torch.Tensor]:
    """Rows of many sizes: the step's floor binds in some and not in others, one is all zero."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, size in tensor_shapes(shape).items():
        w = torch.randn(size, generator=generator)
        if w.dim() == 2:
            w *= 4 ** torch.linspace(-6, 3, len(w))[:, None]
            w[:1] = 0.0
        weights[name] = w
    return weights


def write_qat(path: Path, shape: ModelSpec, encoded: list[Encoded], plan: Plan) -> None:
    meta = artifact_meta(shape, 128, "0" * 64, {"name": "shards"})
    write_whole(path, pack(encoded, plan, meta, "zstd"))


def described(content: dict[str, Any]) -> dict[str, Any]:
    """Everything of a file's dict but the numbers."""

    def describe(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return str(part.dtype), tuple(part.shape), part.stride()
        return part

    return {
        key: [(name, describe(item)) for name, item in part.items()]
        if isinstance(part, dict)
        else part
        for key, part in content.items()
    }


def content_of(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(zlib.decompress(path.read_bytes())), weights_only=True)


@pytest.mark.slow
def test_the_reference_trainers_file_scores_as_the_reference_says(program) -> None:
    expected = json.loads((GOLF / "expected.json").read_text())
    done = program("eval.py", f"artifact={FIXTURE}", "eval.seq_len=128", *TEXT)
    assert done.code == 0, done.err
    assert value(done.out, "val_bpb") == pytest.approx(expected["artifact_val_bpb"], abs=1e-6)
    assert value(done.out, "val_loss") == pytest.approx(expected["artifact_val_loss"], abs=1e-6)
    assert value(done.out, "artifact_bytes") == expected["artifact_bytes"]
    # The code that reads such a file is counted with it, and with nothing else.
    assert value(done.out, "code_bytes") > count_code_bytes()
    model = expected["model"]
    seq_len = model.pop("seq_len")
    assert seq_len == 128
    assert spec_from(read_golf_file(FIXTURE).plan, FIXTURE).as_json() == model


def test_sample_from_it(program) -> None:
    done = program("eval.py", "task=sample", f"artifact={FIXTURE}", "eval.seq_len=128", *TEXT,
                   "sample.max_tokens=8", "prompt=The")  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith("The")


@pytest.mark.parametrize(
    "shape",
    [
        ModelSpec(512, 3, 320, 5, 1, 3, False),
        pytest.param(ModelSpec(1024, 9, 512, 8, 4, 2, True), marks=pytest.mark.slow),
        ModelSpec(300, 1, 64, 4, 4, 1, True),
        ModelSpec(260, 2, 96, 6, 3, 4, False),
        ModelSpec(64, 11, 32, 1, 1, 5, True),
    ],
    ids=str,
)
def test_any_model_is_read_off_its_tensors(shape: ModelSpec, tmp_path: Path) -> None:
    plan = plan_of(shape, min_elements=1000)
    (tmp_path / "m.ptz").write_bytes(pack_golf(plan.encode(random_weights(shape))))
    file = read_golf_file(tmp_path / "m.ptz")
    assert spec_from(file.plan, tmp_path / "m.ptz") == shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tok_emb.weight": None}, "no 'tok_emb.weight'"),
        ({"blocks.1.mlp.fc.weight": None}, "tensor 'blocks.1.mlp.fc.weight' is missing"),
        ({"blocks.1.attn.q_gain": None}, "for 1 layers of width 64"),
        ({"blocks.7.attn.q_gain": (4,)}, "for 3 layers of width 64"),
        ({"bigram.weight": (8, 8)}, "tensor 'bigram.weight' is missing, too many"),
        ({"skip_weights": (2, 64)}, "'skip_weights'"),
        ({"blocks.0.attn.q_gain": (7,)}, "7 heads cannot share a width of 64"),
        ({"blocks.0.attn.q_gain": (64,)}, "64 heads cannot share a width of 64"),
        ({"blocks.0.attn.q_gain": (0,)}, "0 heads cannot share a width of 64"),
        ({"blocks.0.attn.q_gain": (2, 2)}, "not a model of the challenge"),
        ({"blocks.0.attn.c_k.weight": (48, 64)}, "48 key rows are no heads of 16 for 4 heads"),
        ({"blocks.0.attn.c_k.weight": (40, 64)}, "40 key rows are no heads"),
        ({"blocks.0.attn.c_k.weight": (64,)}, "not a model of the challenge"),
        ({"blocks.0.mlp.fc.weight": (96, 64)}, "an MLP of 96 is no multiple of the width 64"),
        ({"tok_emb.weight": (0, 64)}, "not a model of the challenge"),
    ],
    ids=str,
)
def test_what_is_no_model_is_refused(changes: dict, reason: str, program, tmp_path: Path) -> None:
    shapes = tensor_shapes(ModelSpec(300, 2, 64, 4, 2, 2, True)) | changes
    plan = Plan([Entry(name, size) for name, size in shapes.items() if size is not None])
    data = pack_golf(plan.encode({entry.name: torch.ones(entry.shape) for entry in plan}))
    (tmp_path / "m.ptz").write_bytes(data)
    done = program("eval.py", "artifact=m.ptz", "eval.seq_len=128", *TEXT)
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("error: artifact=m.ptz: ")
    assert reason in done.err


def test_a_tokenizer_of_another_vocabulary(prepared_text: Path, program) -> None:
    other = prepared_text / "tokenizer.model"
    done = program("eval.py", f"artifact={FIXTURE}", "eval.seq_len=128", TEXT[0],
                   f"data.tokenizer={other}")  # fmt: skip
    assert done.code == 2
    assert "it has 320 pieces, the model" in done.err
    assert "512 embeddings" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            (f"artifact={FIXTURE}", *TEXT),
            "eval.seq_len = null: a .ptz file does not say; give eval.seq_len=",
        ),
        (
            (f"artifact={FIXTURE}", "eval.seq_len=128", TEXT[1]),
            "data.val_files = null: a .ptz file",
        ),
        (
            (f"artifact={FIXTURE}", "eval.seq_len=128", TEXT[0]),
            "data.tokenizer = null: a .ptz file",
        ),
        ((f"artifact={FIXTURE}", "eval.seq_len=0", *TEXT), "eval.seq_len = 0: give 1 or more"),
        (
            (f"artifact={FIXTURE}", "eval.seq_len=9000000", *TEXT),
            "eval.seq_len = 9000000: the validation",
        ),
        (
            ("artifact=no.ptz", "eval.seq_len=128", *TEXT),
            "artifact=no.ptz: No such file or directory",
        ),
        (("task=export", "out=a.ptz"), "artifact = null: give artifact=PATH or run=RUN"),
        (("task=export", "artifact=a.qat"), "out = null: give one of FILE.gguf, FILE.saf"),
        (
            ("task=export", "artifact=a.qat", "out=b.pt"),
            "out = b.pt: give one of FILE.gguf, FILE.safetensors, FILE.ptz",
        ),
        (("task=export", "artifact=a.qat", "out=b.ptz"), "artifact=a.qat: No such file"),
        (("task=export", f"artifact={FIXTURE}", "out=b.ptz"), "holds tensors only; give a .qat"),
    ],
    ids=str,
)
def test_mistakes(arguments: tuple[str, ...], line: str, program, tmp_path: Path) -> None:
    done = program("eval.py", *arguments)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert line in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_written_as_the_reference_writes(program, tmp_path: Path) -> None:
    """The same sections, names in the same order, types, shapes and strides as in its own file;
    and a reader that knows only the format gets this artifact's weights, bit for bit."""
    plan, weights = plan_of(GOLF_SHAPE), random_weights(GOLF_SHAPE)
    encoded = plan.encode(weights)
    write_qat(tmp_path / "a.qat", GOLF_SHAPE, encoded, plan)
    done = program("eval.py", "task=export", "artifact=a.qat", "out=a,b (1).ptz")
    assert done.code == 0, done.err
    path = tmp_path / "a,b (1).ptz"
    assert value(done.out, "artifact_bytes") == path.stat().st_size

    content, reference = content_of(path), content_of(FIXTURE)
    # The reference trains this one tensor in bfloat16; here it is stored as it was trained.
    assert reference["dtypes"]["tok_emb.weight"] == "bfloat16"
    reference["dtypes"]["tok_emb.weight"] = "float32"
    assert list(content) == list(reference)
    assert described(content) == described(reference)
    for item in encoded:  # not only the weights: the codes and scales that training's export made
        name = item.entry.name
        if item.coded is not None:
            assert torch.equal(content["quantized"][name], item.coded.codes), name
            assert torch.equal(content["scales"][name], item.coded.scales[:, 0]), name

    read = read_artifact(tmp_path / "a.qat").weights
    again, theirs = read_golf_file(path).weights, minimal_reader(path.read_bytes())
    assert set(read) == set(again) == set(theirs)
    for name, w in read.items():
        assert torch.equal(again[name].view(torch.int32), w.view(torch.int32)), name
        assert torch.equal(theirs[name].view(torch.int32), w.view(torch.int32)), name


def test_a_trained_run_converted_scores_the_same(train, program, prepared_text: Path) -> None:
    assert train("qat=int8_golf", "plan.grid_min_elements=2000", "qat.start_step=4",
                 "run_name=r").code == 0  # fmt: skip
    run = Path("logs/runs/r")
    done = program("eval.py", "task=export", f"run={run}", "out=r.ptz")
    assert done.code == 0, done.err
    done = program("eval.py", "artifact=r.ptz", "eval.seq_len=32", "eval.batch_tokens=2048",
                   f"data.val_files={prepared_text}/val_*.bin",
                   f"data.tokenizer={prepared_text}/tokenizer.model")  # fmt: skip
    assert done.code == 0, done.err
    expected = result_of(run)["val_bpb_artifact"]
    assert value(done.out, "val_bpb") == pytest.approx(expected, abs=1e-9)


def test_another_grid_is_refused(finished: Path, program, tmp_path: Path) -> None:
    done = program("eval.py", "task=export", f"artifact={finished}/artifact.qat", "out=r.ptz")
    assert done.code == 2
    assert done.err == (
        f"error: artifact={finished}/artifact.qat: cannot become a .ptz file: it is on the grid "
        "int6; only int8_golf is such a file\n"
    )
    assert not list(tmp_path.glob("*.ptz"))


def test_types_that_the_reference_never_writes_are_refused(program, tmp_path: Path) -> None:
    shape = ModelSpec(300, 1, 64, 4, 2, 2, True)
    weights = random_weights(shape)
    bf16 = build_plan(tensor_shapes(shape), {"grid": GOLF_GRID}, {"*scale": "bf16"} | RULES)
    write_qat(tmp_path / "bf16.qat", shape, bf16.encode(weights), bf16)
    done = program("eval.py", "task=export", "artifact=bf16.qat", "out=o.ptz")
    assert done.code == 2
    assert "tensor blocks.0.attn_scale is stored as bf16, not fp16 or fp32" in done.err
    assert not (tmp_path / "o.ptz").exists()


def test_no_file_is_overwritten_and_none_left_behind(program, tmp_path: Path) -> None:
    shape = ModelSpec(300, 1, 64, 4, 2, 2, True)
    plan = plan_of(shape, min_elements=1000)
    write_qat(tmp_path / "a.qat", shape, plan.encode(random_weights(shape)), plan)
    (tmp_path / "there.ptz").write_bytes(b"precious")
    for out, reason in (
        ("there.ptz", "it is there already"), ("no/a.ptz", "No such file or directory"),
    ):  # fmt: skip
        done = program("eval.py", "task=export", "artifact=a.qat", f"out={out}")
        assert done.code == 2
        assert done.err.startswith(f"error: out={out}: ")
        assert reason in done.err
    assert (tmp_path / "there.ptz").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"a.qat", "there.ptz"}


def test_a_damaged_file_is_one_line_of_the_program(program, tmp_path: Path) -> None:
    (tmp_path / "half.ptz").write_bytes(FIXTURE.read_bytes()[:100_000])
    done = program("eval.py", "artifact=half.ptz", "eval.seq_len=128", *TEXT)
    assert done.code == 2
    assert done.err == (
        "error: artifact=half.ptz: not a readable .ptz file (its zlib data ends early: truncated)\n"
    )
