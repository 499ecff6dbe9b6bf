"""The challenge's own file: its structure both ways; damage and malice of every kind refused."""

from __future__ import annotations

import io
import os
import pickle
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.errors import UserError
from qat.golf import ptz_file as golf_file
from qat.golf import ptz_file as golf_pickle
from qat.golf.bundle import ROOT, code_files
from qat.golf.ptz_file import GOLF_GRID, pack_golf, read_golf_file, unpack_golf
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
from tests.conftest import GOLF

FIXTURE = GOLF / "final_model.int8.ptz"


def raw_of(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def small() -> dict[str, Any]:
    """A right file's content: one matrix on the grid, one kept as fp16, one vector."""
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {"w": torch.tensor([[127, -3], [0, 5]], dtype=torch.int8)},
        "scales": {"w": torch.tensor([0.5, 0.25], dtype=torch.float16)},
        "dtypes": {"w": "float32"},
        "passthrough": {"k": torch.ones(2, 2, dtype=torch.float16), "gain": torch.ones(2)},
        "qmeta": {"w": {"scheme": "per_row", "axis": 0}},
        "passthrough_orig_dtypes": {"k": "float32"},
    }


def refuse(data: bytes, folder: Path) -> str:
    """The one line with which a file is refused."""
    path = folder / "bad.ptz"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_golf_file(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"artifact={path}: not a readable .ptz file (")
    return line


def minimal_reader(data: bytes) -> dict[str, torch.Tensor]:
    """The reference's dequantisation, said again: codes times float32 of the row's scale, fp16
    weights and rows cast to the float type the file names, control vectors as they are."""
    content = torch.load(io.BytesIO(zlib.decompress(data)), weights_only=True)
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    weights = {}
    for name, q in content["quantized"].items():
        w = q.float() * content["scales"][name].float()[:, None]
        weights[name] = w.to(types[content["dtypes"][name]])
    for name, w in content["passthrough"].items():
        original = content.get("passthrough_orig_dtypes", {}).get(name)
        weights[name] = w if original is None else w.to(types[original])
    return weights


def test_grid_is_the_one_named_int8_golf() -> None:
    fields = yaml.safe_load((ROOT / "conf/grid/int8_golf.yaml").read_text())
    assert Grid(**fields) == GOLF_GRID


def test_reads_the_reference_trainers_file() -> None:
    file = read_golf_file(FIXTURE)
    expected = minimal_reader(FIXTURE.read_bytes())
    assert set(file.weights) == set(expected)
    for name, w in file.weights.items():
        assert w.dtype == torch.float32
        assert torch.equal(w, expected[name].float()), name
    # Its embedding was trained in bfloat16, and is one again: not code times scale any more.
    embedding = file.weights["tok_emb.weight"]
    assert torch.equal(embedding, embedding.bfloat16().float())
    assert file.num_bytes == FIXTURE.stat().st_size
    assert len(file.plan.on_grid) == 14


def test_written_file_reads_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    weights = {"w": torch.randn(300, 250), "k": torch.randn(8, 8), "gain": torch.randn(5)}
    weights["w"][3] = 0.0
    weights["w"][4] *= 0.01  # the floor binds
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    plan = build_plan(shapes, {"grid": GOLF_GRID}, {"gain": "fp32", "*": "grid"}, 65_537)
    data = pack_golf(plan.encode(weights))
    assert pack_golf(plan.encode(weights)) == data
    snapped, again, theirs = plan.snap(weights), unpack_golf(data), minimal_reader(data)
    assert again.plan == plan
    for name, w in snapped.items():
        assert torch.equal(again.weights[name].view(torch.int32), w.view(torch.int32)), name
        assert torch.equal(theirs[name].view(torch.int32), w.view(torch.int32)), name


def test_what_has_no_place_in_the_file_is_not_written() -> None:
    for grid, size in ((Grid(bits=8), (2, 4)), (GOLF_GRID, (2, 4, 3))):
        plan = build_plan({"w": size}, {"grid": grid}, {"*": "grid"})
        with pytest.raises(ValueError, match="tensor w is not on the grid int8_golf, row by row"):
            pack_golf(plan.encode({"w": torch.ones(size)}))


def test_a_model_without_small_tensors_has_no_empty_section() -> None:
    plan = build_plan({"w": (2, 4)}, {"grid": GOLF_GRID}, {"*": "grid"})
    content = torch.load(
        io.BytesIO(zlib.decompress(pack_golf(plan.encode({"w": torch.ones(2, 4)})))),
        weights_only=True,
    )
    assert list(content)[-2:] == ["passthrough", "qmeta"]


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "bare"])
def test_a_pickle_that_would_run_something_is_refused(
    protocol: int, is_zip: bool, tmp_path: Path
) -> None:
    content = small() | {"qmeta": Shell(f"touch {tmp_path}/ran")}
    if is_zip:
        buffer = io.BytesIO()
        torch.save(content, buffer, pickle_protocol=protocol)
        raw = buffer.getvalue()
    else:
        raw = pickle.dumps(content["qmeta"], protocol)
    line = refuse(zlib.compress(raw), tmp_path)
    assert ("it would run" in line) == is_zip
    assert not (tmp_path / "ran").exists()
    if not is_zip:  # the trap is a real one
        pickle.loads(raw)
        assert (tmp_path / "ran").exists()


def test_names_that_torch_itself_would_allow_are_refused_too(tmp_path: Path) -> None:
    """``torch.load(weights_only=True)`` lets a file ask for any amount of memory."""
    parameter = small() | {"passthrough": {"gain": torch.nn.Parameter(torch.ones(2))}}
    assert "_rebuild_parameter" in refuse(zlib.compress(raw_of(parameter)), tmp_path)
    sparse = small() | {"passthrough": {"gain": torch.eye(2).to_sparse()}}
    assert "it would run" in refuse(zlib.compress(raw_of(sparse)), tmp_path)


def test_a_bomb_is_refused_before_it_expands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golf_file, "MAX_RAW_BYTES", 1_000_000)
    data = zlib.compress(bytes(50_000_000), 9)
    assert len(data) < 50_000
    tracemalloc.start()
    try:
        assert "more than 1000000 bytes" in refuse(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert "more than 1000000 bytes" in refuse(zlib.compress(bytes(1_000_001)), tmp_path)
    assert "it holds no torch file" in refuse(zlib.compress(bytes(1_000_000)), tmp_path)


def test_an_endless_file_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golf_file, "MAX_RAW_BYTES", 1_000_000)
    with open(tmp_path / "long.ptz", "wb") as file:
        file.truncate(50_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="longer than 1000000 bytes"):
            read_golf_file(tmp_path / "long.ptz")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_within_the_zip_is_refused(tmp_path: Path) -> None:
    raw = raw_of(small())
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as right,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for entry in right.infolist():
            deflated.writestr(entry.filename, right.read(entry))
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # torch would expand it
    assert "its zip expands further" in refuse(zlib.compress(buffer.getvalue()), tmp_path)


def with_pickle(change: Callable[[bytes], bytes]) -> bytes:
    """A right file whose pickle is another; all sizes and checksums are right."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw_of(small()))) as right,
        zipfile.ZipFile(buffer, "w") as forged,
    ):
        for name in right.namelist():
            content = right.read(name)
            forged.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    return zlib.compress(buffer.getvalue())


EMPTY = b"\x80\x02}"  # protocol 2; an empty dict, to which the pickles below add
ONE = b"K\x01"
# A tuple of itself twice, sixty times over: of the last one 2^60 are reached.
DOUBLED = ONE + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
PICKLES = {
    "doubled tuples as a key": EMPTY + DOUBLED + ONE + b"s.",
    "doubled tuples as a value": EMPTY + ONE + DOUBLED + b"s.",
    "doubled tuples name a storage": EMPTY + ONE + DOUBLED + b"Qs.",
    "doubled by an opcode": EMPTY + ONE + ONE + b"2\x86" * 60 + b"s.",
    "doubled dicts": EMPTY
    + b"K\0}q\0s"
    + b"".join(b"K%c}q%cK\1h%csK\2h%css" % (i + 1, i + 1, i, i) for i in range(60))
    + b".",
    "doubled lists": EMPTY
    + b"K\0]q\0s"
    + b"".join(b"K%c]q%c(h%ch%ces" % (i + 1, i + 1, i, i) for i in range(60))
    + b".",
    "a deep tuple as a key": EMPTY + ONE + b"\x85" * 1_000_000 + ONE + b"s.",
    "a tuple of a tuple of a tuple": EMPTY + ONE + ONE + b"\x85" * 3 + b"s.",
    "a tuple as a key": EMPTY + ONE + b"\x85" + ONE + b"s.",
    "many marks": EMPTY + ONE * 250_000 + b"(t" * 250_000 + b".",
    "marks alone": EMPTY + b"(" * 1_000_000 + b".",
    "a longer one": EMPTY + ONE * 600_000 + b".",
    "a number": b"\x80\x02K\x01.",
    "nothing": b"\x80\x02.",
    "no end": EMPTY,
    "from an empty stack": b"\x80\x02ss.",
    "from no place": b"\x80\x02h\x09.",
    "called with what it is not": b"\x80\x02ccollections\nOrderedDict\n" + ONE + b"\x85R.",
    "calls a number": EMPTY + ONE + ONE + b")Rs.",
    "attributes": EMPTY + b"}b.",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_would_take_for_ever_is_refused(program: bytes, tmp_path: Path) -> None:
    """Nothing of it is built: hashing or writing out such tuples would not end, or overflow."""
    began = time.perf_counter()
    line = refuse(with_pickle(lambda _: program), tmp_path)
    assert time.perf_counter() - began < 30
    assert ("its pickle is longer than" in line) == (len(program) > golf_pickle.MAX_PICKLE_BYTES)
    with pytest.raises(ValueError, match=r"refused|it holds no|exhausted|longer"):
        golf_pickle.check_pickle(program)


def test_torch_reads_the_pickle_that_was_looked_at(tmp_path: Path) -> None:
    """Two readers of one zip may disagree on what is in it."""
    raw = raw_of(small())
    assert with_pickle(lambda right: right) != zlib.compress(raw)
    assert (
        unpack_golf(with_pickle(lambda right: right)).plan == unpack_golf(zlib.compress(raw)).plan
    )
    buffer = io.BytesIO(raw)
    with zipfile.ZipFile(buffer, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, archive.read(name))
    assert "it holds no torch file" in refuse(zlib.compress(buffer.getvalue()), tmp_path)


def test_truncation_is_refused(tmp_path: Path) -> None:
    data = FIXTURE.read_bytes()
    for size in (0, 1, 2, 100, len(data) // 2, len(data) - 5, len(data) - 1):
        assert "truncated" in refuse(data[:size], tmp_path)
    assert "left over" in refuse(data + b"\0", tmp_path)


def test_flipped_bits_are_refused(tmp_path: Path) -> None:
    data = FIXTURE.read_bytes()
    for position in range(0, len(data), len(data) // 25):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        refuse(bytes(flipped), tmp_path)


@pytest.mark.slow
def test_damage_below_the_checksum_is_refused_or_harmless(tmp_path: Path) -> None:
    """Someone who flips bits may also mend the checksums: still one line, whatever was hit."""
    raw = raw_of(small())
    refused = 0
    for position in range(len(raw)):
        forged = bytearray(raw)
        forged[position] ^= 1 << position % 8
        try:
            unpack_golf(zlib.compress(bytes(forged), 0))
        except ValueError:
            refused += 1
    assert refused > len(raw) / 3  # the rest is padding and dates
    for junk in (b"", b"PK\x03\x04", b"\x80\x02}.", bytes(500), b"QATMODEL" * 20):
        refuse(zlib.compress(junk), tmp_path)
        refuse(junk, tmp_path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.ptz", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason):
            read_golf_file(path)


Change = Callable[[dict[str, Any]], object]
FORGERIES: dict[str, tuple[Change, str]] = {
    "format": (lambda c: c.update(__quant_format__="v2"), "does not say __quant_format__"),
    "format is a tensor": (lambda c: c.update(__quant_format__=torch.ones(2)), "does not say"),
    "no scales": (lambda c: c.pop("scales"), "does not consist of"),
    "one section more": (lambda c: c.update(extra={}), "does not consist of"),
    "section is a list": (lambda c: c.update(passthrough=[]), "its passthrough is not a dict"),
    "name is a number": (lambda c: c["passthrough"].update({3: torch.ones(2)}), "is not a dict by"),
    "a scale too much": (lambda c: c["scales"].update(x=torch.ones(2)), "different tensors"),
    "named twice": (lambda c: c["passthrough"].update(w=torch.ones(2)), "twice"),
    "unknown qmeta": (lambda c: c["qmeta"].update(x={}), "its qmeta names"),
    "other scheme": (lambda c: c["qmeta"]["w"].update(scheme="x"), "w is not quantized row by row"),
    "axis is a tensor": (lambda c: c["qmeta"]["w"].update(axis=torch.zeros(2)), "row by row"),
    "original of nothing": (
        lambda c: c["passthrough_orig_dtypes"].update(x="float32"), "that is not there"
    ),
    "float type": (lambda c: c["dtypes"].update(w="int8"), "tensor w has a float type"),
    "float type is a list": (lambda c: c["dtypes"].update(w=["float32"]), "tensor w has a float"),
    "codes of int32": (
        lambda c: c["quantized"].update(w=torch.zeros(2, 2, dtype=torch.int32)), "it would run"
    ),
    "codes as floats": (
        lambda c: c["quantized"].update(w=torch.ones(2, 2)), "w is not a plain tensor of int8"
    ),
    "codes are text": (lambda c: c["quantized"].update(w="x"), "tensor w is not a plain tensor"),
    "a scale for all": (
        lambda c: c["scales"].update(w=torch.tensor(0.5, dtype=torch.float16)), "a scale per row"
    ),
    "codes of 3 dimensions": (
        lambda c: c["quantized"].update(w=torch.ones(2, 1, 2, dtype=torch.int8)), "not a matrix"
    ),
    "float32 scales": (
        lambda c: c["scales"].update(w=torch.ones(2)), "scales of w is not a plain tensor of float"
    ),
    "infinite scale": (
        lambda c: c["scales"].update(w=torch.tensor([1, torch.inf]).half()), "w has a value that is"
    ),
    "NaN": (lambda c: c["passthrough"].update(gain=torch.tensor([torch.nan])), "not finite"),
    "too large for its type": (
        lambda c: (c["dtypes"].update(w="float16"), c["scales"]["w"].fill_(6e4)), "not finite"
    ),
    "a terabyte of one number": (
        lambda c: c["passthrough"].update(gain=torch.ones(1).expand(10**6, 10**6)), "plain tensor"
    ),
    "transposed": (
        lambda c: c["passthrough"].update(gain=torch.ones(2, 3).t()), "not a plain tensor"
    ),
    "one storage, many names": (
        lambda c: (
            c["passthrough"].clear(), c["passthrough_orig_dtypes"].clear(),
            c["passthrough"].update(dict.fromkeys(map(str, range(300)), torch.ones(10_000))),
        ), "larger than the file",
    ),
    "wants gradients": (
        lambda c: c["passthrough"].update(gain=torch.ones(2, requires_grad=True)), "plain tensor"
    ),
    "terminal codes in a name": (
        lambda c: c["passthrough"].update({"\x1b[31m\n": torch.tensor([torch.inf])}),
        "tensor ??31m? has a value",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_content_is_refused(change: Change, reason: str, tmp_path: Path) -> None:
    content = small()
    change(content)
    assert reason in refuse(zlib.compress(raw_of(content)), tmp_path)


def test_what_the_forgeries_start_from_is_right() -> None:
    weights = unpack_golf(zlib.compress(raw_of(small()))).weights
    assert weights["w"].tolist() == [[63.5, -1.5], [0.0, 1.25]]


def test_its_code_is_not_counted_for_a_qat_file() -> None:
    counted = {str(path.relative_to(ROOT)) for path in code_files()}
    assert not {name for name in counted if "ptz" in name or "qat/export" in name}
