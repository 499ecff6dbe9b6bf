"""Damaged and forged files by the thousand, each read under a watch.

    python -W error -m tests.damage qat 20000     (or ptz; a second number is the seed)

Every file must be refused in one line that names it, or open as what its bytes say. Ends with the
counts, or at the first file that does neither, whose bytes it then keeps. The process may not take
``MOST_MEMORY`` more than it began with, nor a file longer than ``SECONDS_A_FILE``.
"""

from __future__ import annotations

import copy
import faulthandler
import hashlib
import io
import json
import random
import resource
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qat.artifact import mix_coder
from qat.artifact.coder import CODERS
from qat.artifact.container import HASH_BYTES, PREFIX, pack, read_artifact
from qat.errors import UserError
from qat.golf.ptz_file import read_golf_file
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan

SECONDS_A_FILE = 20
MOST_MEMORY = 300_000_000
ADDRESS_SPACE = 3_000_000_000  # beyond what is mapped at the start: threads, and lazily used zeros
GRIDS = (
    Grid(bits=6),
    Grid(bits=4, group_size=6),
    Grid("ternary", scale_rule="absmean", refit=True),
    Grid("fp8_e4m3"),
    Grid(bits=4, range="asymmetric", group_size=8),
    Grid(bits=5, per_tensor=True, scale_rule="learned", scale_dtype="fp32"),
    Grid(bits=5, scale_rule="given", scale_dtype="bf16", column_scales=True),
    Grid(bits=4, rotate=8),
)
RULES = {"gain": "fp32", "scale": "fp16", "mix": "bf16", "*": "grid"}
SHAPES = {"emb": (12, 16), "w": (16, 20), "v": (9,), "gain": (3,), "scale": (16,), "mix": (2, 8)}
STREAM_CODES = 150  # in place of four million: the codes above make three streams
ODD = (
    0, -1, 1, 2, 7, 2**31, 2**40, 2**63, 10**18, -(2**63), 10**30, 0.0, 1.5, -2.5, 1e300, True,
    False, None, "", "x", "mix", "fp32", "\x1b[2J", "\ud800", [], {}, [[]], [[[[0]]]], [1] * 70,
)  # fmt: skip
ODD_TEXT = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"9" * 200_000, b"[" * 50_000, b'{"a":1,"a":2}'
)  # fmt: skip


def artifacts() -> list[bytes]:
    """One file for every coder and grid."""
    made = []
    for number, grid in enumerate(GRIDS):
        generator = torch.Generator().manual_seed(number)
        masters = {name: torch.randn(s, generator=generator) for name, s in SHAPES.items()}
        masters["w"][5] = 0.0
        plan = build_plan(SHAPES, {"grid": grid}, RULES)
        given = {e.name: torch.full(e.scales_shape, 0.3) for e in plan.on_grid}
        encoded = plan.encode(masters, given if grid.scale_rule == "given" else {})
        made += [pack(encoded, plan, {"model": {"dim": 16}}, coder) for coder in CODERS]
    return made


def damage(chooser: random.Random, data: bytes, ends: tuple[int, ...] = ()) -> bytes:
    """Some bytes other than they were. ``ends`` are places of interest."""
    bad = bytearray(data)
    places = [*ends, *(end + 1 for end in ends), *(end - 1 for end in ends)]
    for _ in range(chooser.choice((1, 1, 1, 2, 5))):
        at = chooser.choice(places) if places and chooser.random() < 0.3 else -1
        at = at if 0 <= at <= len(bad) else chooser.randint(0, len(bad))
        size = min(int(2 ** chooser.uniform(0, 9)), len(bad) - at)
        filler = chooser.choice((bytes(size), b"\xff" * size, chooser.randbytes(size)))
        match chooser.randrange(6):
            case 0:
                del bad[at:]
            case 1 | 2 if at < len(bad):
                bad[at] ^= 1 << chooser.randrange(8)
            case 3:
                bad[at : at + size] = filler
            case 4:
                bad[at:at] = filler
            case _:
                del bad[at : at + size]
    return bytes(bad)


def edit(chooser: random.Random, content: Any) -> None:
    """Change one value, somewhere in lists and objects."""
    places = []
    waiting = [content]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    if not places:
        return
    node, key = chooser.choice(places)
    other, other_key = chooser.choice(places)
    match chooser.randrange(6):
        case 0:
            del node[key]
        case 1:
            node[key] = [node[key]]
        case 2:
            node[key] = copy.deepcopy(other[other_key])
        case 3 if isinstance(node, list):
            node.insert(chooser.randint(0, len(node)), copy.deepcopy(node[key]))
        case _:  # a copy: what is edited next may lie inside it
            node[key] = copy.deepcopy(chooser.choice(ODD))


def forge(chooser: random.Random, data: bytes) -> bytes:
    """Header or sections other than they were, sizes mostly made right again."""
    magic, version, length = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    rest = data[PREFIX.size + length : -HASH_BYTES]
    sections, raw_header = header["sections"], None
    ends = [0]
    for section in sections:
        ends.append(ends[-1] + section[3])
    parts = [rest[start:end] for start, end in pairwise(ends)]
    one, two = chooser.randrange(len(sections)), chooser.randrange(len(sections))
    match chooser.randrange(9):
        case 0 | 1 | 2:
            for _ in range(chooser.choice((1, 1, 1, 2, 3))):
                edit(chooser, header)
        case 3:
            sections[one][1] = chooser.choice([*CODERS, "auto", "pickle"])
        case 4:
            size = chooser.choice((2, 3))
            sections[one][size], sections[two][size] = sections[two][size], sections[one][size]
        case 5:  # more of everything: shapes, and the sizes that go with them
            entry = chooser.choice(header["plan"])
            if entry["shape"]:
                entry["shape"][0] *= chooser.choice((2, 1000, 10**6, 10**9, 10**12))
            sections[one][2] = int(sections[one][2] * chooser.choice((1, 2, 1000, 10**9)))
        case 6:
            text = json.dumps(header).encode()
            at = chooser.choice([i for i, byte in enumerate(text) if byte in b":,["]) + 1
            raw_header = text[:at] + chooser.choice(ODD_TEXT) + text[at:]
            if chooser.random() < 0.7:  # in place of what was there
                raw_header = text[:at] + chooser.choice(ODD_TEXT) + text[at + 1 :]
        case _:
            parts[one] = damage(chooser, parts[one], (0, 4, 8, 12))
            sections[one][3] = len(parts[one])
    raw_header = json.dumps(header).encode() if raw_header is None else raw_header
    length = len(raw_header)
    if chooser.random() < 0.02:
        length = chooser.choice((0, 1, length - 1, length + 1, 2**31, 2**32 - 1))
        version = chooser.choice((version, 0, 1, 3, 2**32 - 1))
    return PREFIX.pack(magic, version, length) + raw_header + b"".join(parts) + data[-HASH_BYTES:]


def rehash(data: bytes) -> bytes:
    body = data[:-HASH_BYTES]
    return body + hashlib.sha256(body).digest()


def bad_artifact(chooser: random.Random, good: bytes) -> tuple[str, bytes]:
    """(what was done to a file, the file)."""
    length = PREFIX.unpack_from(good)[2]
    ends = [0, 8, 12, PREFIX.size, PREFIX.size + length, len(good) - HASH_BYTES]
    for *_, coded in json.loads(good[PREFIX.size : PREFIX.size + length])["sections"]:
        ends.append(ends[-1] + coded if len(ends) > 6 else ends[4] + coded)
    kind = chooser.choice(("damaged", "damaged, hash mended", "forged", "forged", "forged"))
    if kind == "forged":
        return kind, rehash(forge(chooser, good))
    bad = damage(chooser, good, tuple(ends))
    return kind, bad if kind == "damaged" else rehash(bad)


def read_as_it_says(path: Path, kind: str) -> None:
    """Read a file; AssertionError if what opens is not exactly what its bytes say."""
    artifact = read_artifact(path)
    assert kind != "damaged", "a wrong hash was not seen"
    assert list(artifact.weights) == [entry.name for entry in artifact.plan]
    for item in artifact.encoded:
        entry, w = item.entry, artifact.weights[item.entry.name]
        assert tuple(w.shape) == entry.shape
        assert w.dtype == torch.float32
        assert torch.isfinite(w).all()
        assert torch.equal(w, item.decode())
        if entry.grid and item.coded:
            low, high = entry.grid.table.codes
            for codes in (item.coded.codes, item.coded.zeros):
                assert codes is None or ((codes >= low) & (codes <= high)).all()
    again = pack(artifact.encoded, artifact.plan, artifact.meta, "zlib")
    path.write_bytes(again)
    for name, w in read_artifact(path).weights.items():
        assert torch.equal(w.view(torch.int32), artifact.weights[name].view(torch.int32))


def bad_golf_file(chooser: random.Random, good: bytes) -> tuple[str, bytes]:
    kind = chooser.choice(("compressed", "zip", "entry", "pickle", "pickle"))
    if kind == "compressed":
        return kind, damage(chooser, good)
    raw = zlib.decompress(good)
    if kind == "zip":
        return kind, zlib.compress(damage(chooser, raw), 1)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    names = [n for n in entries if kind == "entry" or n.endswith("data.pkl")]
    name = chooser.choice(names)
    if kind == "pickle" and chooser.random() < 0.7:  # an opcode or small number for another
        program = bytearray(entries[name])
        for _ in range(chooser.choice((1, 1, 2, 3))):
            program[chooser.randrange(len(program))] = chooser.choice(
                b"(tu}])\x85\x86\x87hqRQK\x880.2a"
            )
        entries[name] = bytes(program)
    else:
        entries[name] = damage(chooser, entries[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return kind, zlib.compress(buffer.getvalue(), 1)


def read_golf(path: Path, kind: str) -> None:
    file = read_golf_file(path)
    for entry in file.plan:
        w = file.weights[entry.name]
        assert tuple(w.shape) == entry.shape
        assert torch.isfinite(w).all()


def verdict(path: Path, kind: str, data: bytes, read: Callable[[Path, str], None]) -> str:
    """ "opened" or "refused"; AssertionError or anything else is a fault of the reader."""
    path.write_bytes(data)
    try:
        read(path, kind)
    except UserError as error:
        line = str(error)
        assert line.startswith(f"artifact={path}: "), line
        assert "\n" not in line, line
        assert len(line) < len(str(path)) + 400, line
        return "refused"
    return "opened"


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most (what getrusage says is the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(row.split()[1]) for row in status.splitlines() if row.startswith(kind))


def main(which: str, count: int, seed: int) -> None:
    mix_coder.STREAM_CODES = STREAM_CODES
    torch.set_num_threads(1)
    chooser, counts = random.Random(seed), Counter[str]()
    if which == "qat":
        goods, make, read = artifacts(), bad_artifact, read_as_it_says
    else:
        from tests.golf.test_ptz_file import raw_of, small

        goods, make, read = [zlib.compress(raw_of(small()))], bad_golf_file, read_golf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.file"
        for good in goods:  # undamaged, all open; and whatever is slow to load is loaded
            assert verdict(path, "as it was", good, read) == "opened"
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_SPACE,) * 2)
        before = memory("VmRSS")
        for number in range(count):
            good = goods[number % len(goods)]
            kind, data = make(chooser, good)
            if data == good:
                counts["unchanged"] += 1
                continue
            faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True)
            try:
                counts[f"{kind}: {verdict(path, kind, data, read)}"] += 1
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"bad_{which}_{seed}_{number}"
                kept.write_bytes(data)
                print(f"{kind} file {number}, kept as {kept}", file=sys.stderr)
                raise
        faulthandler.cancel_dump_traceback_later()
        more = memory("VmHWM") - before
    assert more < MOST_MEMORY, f"{more:,} bytes of memory more than at the start"
    counts["refused"] = sum(n for name, n in counts.items() if name.endswith(": refused"))
    counts["opened"] = sum(n for name, n in counts.items() if name.endswith(": opened"))
    print(json.dumps(dict(sorted(counts.items())) | {"memory": more}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
