"""What a file says is believed only within bounds: headers, sizes, memory, versions, streams."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

from qat.artifact import coder, container, mix_coder
from qat.artifact.coder import CODERS, GENERAL
from qat.artifact.container import (
    MAGIC,
    MAX_HEADER_BYTES,
    PREFIX,
    Header,
    pack,
    read_artifact,
    write_whole,
)
from qat.artifact.sections import Matrix, Section, section_sizes
from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes
from tests.artifact.test_coders import draw_codes
from tests.artifact.test_container import forged, packed, refuse
from tests.conftest import ROOT
from tests.damage import memory

MOST = 40_000_000  # of memory, for a file of a few kB that is refused
INT6 = Grid(bits=6)
NOTHING = zlib.compress(b"")


def sealed(text: bytes, sections: bytes = b"", version: int = 3) -> bytes:
    body = PREFIX.pack(MAGIC, version, len(text)) + text + sections
    return body + hashlib.sha256(body).digest()


def bomb(plan: list[dict], used: str = "zlib", codes: bytes = NOTHING) -> bytes:
    """A small file whose sections are as large as its plan says, in its header."""
    sizes = section_sizes(Plan.from_json(plan))
    parts, coders = [codes, NOTHING, NOTHING], [used, "zlib", "zlib"]
    sections = [
        [name, coder, size, len(part)]
        for (name, size), coder, part in zip(sizes.items(), coders, parts, strict=True)
    ]
    text = json.dumps({"meta": {}, "plan": plan, "sections": sections}).encode()
    return sealed(text, b"".join(parts))


def refuse_cheaply(data: bytes, folder: Path) -> str:
    tracemalloc.start()
    try:
        line = refuse(data, folder)
        assert tracemalloc.get_traced_memory()[1] < MOST + 3 * len(data)
    finally:
        tracemalloc.stop()
    return line


def plain(shape: object, name: str = "w") -> dict:
    return {"name": name, "shape": shape, "dtype": "fp32"}


@pytest.mark.parametrize("times", [0.2, 50, 10**6])
def test_a_kilobyte_that_declares_more_than_this_machine_has(times: float, tmp_path: Path) -> None:
    """An honest one could be written too: zeros compress that well. ``times`` its memory, in
    weights."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = int(times * memory)
    line = refuse_cheaply(bomb([plain([size])]), tmp_path)
    assert f"takes up to {8 * size:,} bytes, this machine has {memory:,}" in line


def test_scales_count_too(tmp_path: Path) -> None:
    grid = {"bits": 6}
    line = refuse_cheaply(bomb([{"name": "w", "shape": [10**12, 0], "grid": grid}]), tmp_path)
    assert "this machine has" in line


def refusals(folder: Path) -> dict[str, tuple[str, int, float]]:
    """Coder -> the refusal of a file that declares 600 MB of codes and has none, what it took of
    memory, seconds. VmHWM, because tracemalloc counts untouched zeros."""
    plan = [{"name": "w", "shape": [60_000, 10_000], "grid": {"bits": 6}}]
    streams = {"mix": np.array([20], np.uint32).tobytes() + bytes(20), "zlib": NOTHING}
    found = {}
    for used in CODERS:
        path = folder / "bad.qat"
        path.write_bytes(packed(coder=used))
        read_artifact(path)  # what is loaded or compiled on first use
        codes = streams[used] if used in streams else CODERS[used].encode(b"", [])
        path.write_bytes(bomb(plan, used, codes))
        before, began = memory("VmHWM"), time.perf_counter()
        with pytest.raises(UserError) as refusal:
            read_artifact(path)
        taken = memory("VmHWM") - before
        found[used] = (str(refusal.value), taken, time.perf_counter() - began)
    return found


@pytest.fixture(scope="module")
def refused_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """In a process of its own: in one that took more before, VmHWM says nothing."""
    code = (
        "import json, sys; from pathlib import Path; from tests.artifact.test_reader import "
        "refusals; print(json.dumps(refusals(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path_factory.mktemp("refused"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("used", [*CODERS])
def test_a_section_without_the_codes_it_declares_costs_nothing(
    used: str, refused_elsewhere: dict[str, list]
) -> None:
    """600 MB are declared; as many are neither touched nor decoded."""
    line, taken, seconds = refused_elsewhere[used]
    assert re.search(r"bad.qat: not a readable artifact .*section", line)
    assert taken < MOST
    assert seconds < 10


@pytest.mark.parametrize("used", ["zlib", pytest.param("brotli", marks=pytest.mark.slow)])
def test_an_expansion_ends_where_its_section_should(used: str) -> None:
    coded = CODERS[used].encode(bytes(100_000_000), [])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"declared size|damaged"):
            CODERS[used].decode(coded, 1000, [])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_bytes_between_the_sections_and_the_hash(tmp_path: Path) -> None:
    body = packed()[:-32]
    for other in (body + b"x", body[:-1]):
        line = refuse(other + hashlib.sha256(other).digest(), tmp_path)
        assert "its sections do not end where the file does" in line


BOMBS = {
    "long": (b" " * (MAX_HEADER_BYTES + 1), "is over 1,048,576"),
    "entries": (b'{"plan":[' + b",".join([b"{}"] * 1_000_000) + b"]}", "is over 1,048,576"),
    "deep": (b"[" * MAX_HEADER_BYTES, "recursion"),
    "digits": (b'{"plan":' + b"9" * 100_000 + b"}", "a number of 100000 digits"),
    "not a number": (b'{"plan":NaN}', "the number NaN"),
    "infinite": (b'{"plan":-Infinity}', "the number -Infinity"),
    "too large": (b'{"plan":1e999}', "the number 1e999"),
    "twice": (b'{"plan":[],"plan":[]}', "the same key twice"),
    "utf-16": ('{"plan":[]}'.encode("utf-16"), "codec can't decode"),
    "list": (b"[]", "list indices"),
    "empty": (b"", "Expecting value"),
}


@pytest.mark.parametrize(("text", "reason"), BOMBS.values(), ids=BOMBS)
def test_header_bombs(text: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refuse_cheaply(sealed(text), tmp_path)


ODD_ENTRIES = [  # (floats they would have, the entry): the sections fit, so only the entry is odd
    (0, plain([2**63, 0])), (0, plain([10**18, 10**18, 0])), (0, plain([0] * 9)),
    (0, plain([0] * 400_000)), (0, plain([0], "a\nb")), (0, plain([0], "\x1b[2J")),
    (0, plain([0], "\ud800")), (0, plain([0], 7)), (1, plain("")), (1, plain({})),
    (1, plain([True])), (1, plain([1.0])), (1, plain(None)), (1, plain([1]) | {"dtype": "int8"}),
    (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6.0}}),
    (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6, "group_size": 2.0}}),
    (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6, "group_size": True}}),
    (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6, "per_tensor": 0}}),
    (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6, "sigma": True}}),
    (0, {"name": "w", "shape": [0, 4], "grid": [["bits", 6]]}),
    (0, {"name": "w", "shape": [4, 0], "grid": {"bits": 6, "scale_dtype": "fp32"}}),
]  # fmt: skip


def with_entry(entry: dict, floats: int) -> bytes:
    parts = [zlib.compress(b""), zlib.compress(b""), zlib.compress(bytes(4 * floats))]
    raw = (0, 0, 4 * floats)
    names = ("codes", "floats16", "floats32")
    sections = [[n, "zlib", r, len(part)] for n, r, part in zip(names, raw, parts, strict=True)]
    text = json.dumps({"meta": {}, "plan": [entry], "sections": sections}).encode()
    return sealed(text, b"".join(parts))


@pytest.mark.parametrize(
    ("floats", "entry"), ODD_ENTRIES, ids=[json.dumps(entry)[:60] for _, entry in ODD_ENTRIES]
)
def test_entries_that_no_plan_has(floats: int, entry: dict, tmp_path: Path) -> None:
    refuse_cheaply(with_entry(entry, floats), tmp_path)


def test_entries_that_a_plan_may_have(tmp_path: Path) -> None:
    """So the refusals above are about what is odd."""
    for floats, entry in (
        (0, plain([0] * 8)), (1, plain([])), (1, plain([1])),
        (0, {"name": "w", "shape": [0, 4], "grid": {"bits": 6, "group_size": 2, "sigma": 12}}),
    ):  # fmt: skip
        (tmp_path / "a.qat").write_bytes(with_entry(entry, floats))
        assert list(read_artifact(tmp_path / "a.qat").weights) == ["w"]


def test_a_million_million_empty_rows_take_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero codes are quickly read, but not one row after another."""
    plan = Plan([Entry("w", (10**15, 0), Grid(bits=6, group_size=4))])
    parts = {"codes": ("mix", b"\0\0\0\0"), "floats16": ("zlib", zlib.compress(b""))}
    parts["floats32"] = parts["floats16"]
    parts["codes"] = ("mix", mix_coder.encode(b"", [Matrix(10**15, 0, 5, False, "w")]))
    sections = [Section(name, used, 0, len(part)) for name, (used, part) in parts.items()]
    body = b"".join(part for _, part in parts.values())
    monkeypatch.delattr(mix_coder, "code_tensor")
    (tmp_path / "a.qat").write_bytes(sealed(Header({}, plan, sections).as_bytes(), body))
    assert read_artifact(tmp_path / "a.qat").weights["w"].shape == (10**15, 0)


def test_a_writer_keeps_to_the_header_that_a_reader_takes() -> None:
    plan = Plan([Entry("x" * 1000 + str(i), (0,), None, "fp32") for i in range(1100)])
    weights = {entry.name: torch.zeros(0) for entry in plan}
    with pytest.raises(ValueError, match=r"its header of .* bytes is over"):
        pack(plan.encode(weights), plan, {}, "zlib")


def test_a_model_of_zeros_opens(tmp_path: Path) -> None:
    """A thousand to one is nothing unusual."""
    plan = Plan([Entry("w", (2000, 1500), INT6), Entry("gain", (9,), None, "fp32")])
    weights = {"w": torch.zeros(2000, 1500), "gain": torch.zeros(9)}
    for used in CODERS:
        data = pack(plan.encode(weights), plan, {}, used)
        assert len(data) < 12_000, used
        write_whole(tmp_path / "a.qat", data)
        assert not read_artifact(tmp_path / "a.qat").weights["w"].any()


def test_other_versions_and_other_files(tmp_path: Path) -> None:
    assert "format 1, older than format 3" in refuse(sealed(b"{}", version=1), tmp_path)
    assert "format 4, newer than format 3" in refuse(sealed(b"{}", version=4), tmp_path)
    assert "does not begin as an artifact" in refuse(b"QATMODEM" + packed()[8:], tmp_path)


def test_zero_points_outside_their_grid(tmp_path: Path) -> None:
    plan = Plan([Entry("w", (2, 4), Grid(bits=4, range="asymmetric"))])
    (item,) = plan.encode({"w": torch.randn(2, 4)})
    assert item.coded is not None
    assert item.coded.zeros is not None
    item.coded.zeros[1] = 100
    line = refuse(pack([item], plan, {}, "zlib"), tmp_path)
    assert "tensor w has a code outside its grid" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: (file.seek(500_000), file.write(b"?")), "it changed while it was read"),
        (lambda file: file.truncate(400_000), "it became shorter while it was read"),
        (lambda file: None, ""),
    ],
    ids=["other", "shorter", "same"],
)
def test_a_file_that_changes_after_its_hash_was_right(
    change: Callable, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is stored as it is, so a byte of it can change and all sizes remain right."""
    path = tmp_path / "a.qat"
    noise = np.random.default_rng(0).integers(-125, 125, (1000, 800)).astype(np.int8)
    plan = Plan([Entry("w", noise.shape, Grid(bits=8))])
    codes = Codes(torch.from_numpy(noise), torch.ones(1000, 1, dtype=torch.float16))
    path.write_bytes(pack([Encoded(plan.entries["w"], codes)], plan, {}, "zstd"))
    begun = []

    class Changed(container._Body):
        def __init__(self, file: BufferedReader, num_bytes: int) -> None:
            super().__init__(file, num_bytes)
            begun.append(self)
            if len(begun) == 2:
                with open(path, "r+b") as other:
                    change(other)

    monkeypatch.setattr(container, "_Body", Changed)
    if reason:
        with pytest.raises(UserError, match=reason):
            read_artifact(path)
    else:
        read_artifact(path)
    assert len(begun) == 2


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe waits for ever, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"artifact={path}: not a file"):
            read_artifact(path)


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> bytearray:
        raise MemoryError

    monkeypatch.setitem(coder.CODERS, "zlib", coder.Coder(no_memory, no_memory))
    (tmp_path / "a.qat").write_bytes(packed(coder="zstd"))
    read_artifact(tmp_path / "a.qat")
    (tmp_path / "a.qat").write_bytes(forged(lambda h: h["sections"][0].__setitem__(1, "zlib")))
    with pytest.raises(UserError, match="not enough memory to read it"):
        read_artifact(tmp_path / "a.qat")


def test_a_mix_stream_ends_where_its_codes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and not after: no reader runs beyond the bytes that are there."""
    monkeypatch.setattr(mix_coder, "STREAM_CODES", 300)
    matrices = [Matrix(20, 20, 5, False, "a"), Matrix(30, 20, 5, False, "b")]
    raw = draw_codes(0, matrices)
    coded = mix_coder.encode(raw, matrices)
    first, second = np.frombuffer(coded[:8], np.uint32).tolist()
    streams = coded[8 : 8 + first], coded[8 + first :]
    assert len(streams[1]) == second

    def with_streams(*parts: bytes) -> bytes:
        return np.array([len(part) for part in parts], np.uint32).tobytes() + b"".join(parts)

    assert with_streams(*streams) == coded
    for one in (streams[0] + b"\0", streams[0][:-1], streams[0][:3], b"", streams[0][:40]):
        with pytest.raises(ValueError, match="do not end with their codes"):
            mix_coder.decode(with_streams(one, streams[1]), len(raw), matrices)
    for other in (b"", coded[:3], coded[:7], coded[:-1], coded + b"x"):
        with pytest.raises(ValueError, match="declared size"):
            mix_coder.decode(other, len(raw), matrices)


def test_a_magnitude_that_no_code_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits hold 200; in int8 it would be another code."""
    matrices = [Matrix(2, 2, 8, False, "w")]
    for magnitude, negative, opens in (
        (127, 0, True),
        (128, 1, True),
        (128, 0, False),
        (200, 1, False),
    ):
        odd = np.array([[1, magnitude], [3, 4]], np.uint8), np.full((2, 2), negative, np.uint8)
        with monkeypatch.context() as patch:
            patch.setattr(mix_coder, "_split", lambda *_, odd=odd: odd)
            coded = mix_coder.encode(bytes(4), matrices)
        if opens:
            codes = np.frombuffer(mix_coder.decode(coded, 4, matrices), np.int8)
            assert abs(int(codes[1])) == magnitude
        else:
            with pytest.raises(ValueError, match="a code outside int8"):
                mix_coder.decode(coded, 4, matrices)


@pytest.mark.parametrize("used", [*GENERAL])
def test_coders_take_no_byte_more_or_less(used: str) -> None:
    """At sizes about the pieces in which they read and write."""
    chooser = np.random.default_rng(0)
    fast = {"brotli": lambda raw: brotli.compress(raw, quality=3)}
    encode = fast.get(used, lambda raw: CODERS[used].encode(raw, []))
    for raw in (b"", b"x", chooser.bytes(70_000), bytes(3 << 20), chooser.bytes((1 << 20) + 1)):
        coded = encode(raw)
        assert CODERS[used].decode(coded, len(raw), []) == raw
        if used == "zstd" and not raw:
            continue  # the library looks no further than a declared size of 0
        for bad in (coded + b"x", coded + bytes(200_000), coded[:-1], coded + coded, b""):
            with pytest.raises(ValueError, match="section"):
                CODERS[used].decode(bad, len(raw), [])
        for size in {max(len(raw) - 1, 0), len(raw) + 1} - {len(raw)}:
            with pytest.raises(ValueError, match="section"):
                CODERS[used].decode(coded, size, [])
