"""The artifact file: everything needed to rebuild a quantized model, and nothing that executes.

Format 3, little-endian:

    8 bytes    magic ``QATMODEL``
    4 bytes    format version (uint32)
    4 bytes    header length H (uint32)
    H bytes    header, UTF-8 JSON with sorted keys: format-independent ``meta`` (model, tokenizer
               hash, data source), ``plan``, ``sections`` [[name, coder, raw bytes, coded bytes]]
    ...        the coded sections, in header order (``qat.artifact.sections``)
    32 bytes   SHA-256 of all that precedes

The bytes are a function of weights, plan, meta and coder only: no time, host, run name or seed.
Reading checks length, magic, version and hash before it believes anything else, then the header's
length, strict JSON, and every size against the plan and the plan against this machine's memory,
before it allocates. Whoever forges a file also forges its hash, so nothing in the header is
trusted: ValueError, TypeError, LookupError or RecursionError say what is wrong, and the reader
makes them one line. Reading takes less memory than twice the tensors as float32, beside the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qat.artifact.coder import CODERS, encode_section
from qat.artifact.sections import Section, matrices_of, section_of, section_sizes
from qat.errors import UserError
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes

ARTIFACT = "artifact.qat"  # the name of a run's file
OVERSIZE_SUFFIX = ".oversize"
MAGIC = b"QATMODEL"
FORMAT = 3
PREFIX = struct.Struct("<8sII")
HASH_BYTES = 32
CHUNK_BYTES = 1 << 20
# Some 400 a tensor, so 2,500 tensors; parsed, a header takes thirty times that.
MAX_HEADER_BYTES = 1 << 20
MAX_DIGITS = 19  # of an integer: nothing true needs more, and products of longer ones take minutes
Buffer = bytearray | memoryview


@dataclass(frozen=True)
class Header:
    meta: dict[str, Any]
    plan: Plan
    sections: list[Section]

    def as_bytes(self) -> bytes:
        """ValueError if it is longer than a reader takes."""
        content = {"meta": self.meta, "plan": self.plan.as_json(), "sections": self.sections}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        check_length(len(text))
        return text


def check_length(num_bytes: int) -> None:
    if num_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {num_bytes:,} bytes is over {MAX_HEADER_BYTES:,}")


def read_header(text: bytes | bytearray) -> Header:
    """Parse and check; every size in it then fits its plan, and the plan this machine."""
    content = json.loads(
        text.decode(),
        object_pairs_hook=_without_duplicates,
        parse_int=_bounded_int,
        parse_float=_finite,
        parse_constant=_finite,
    )
    plan = Plan.from_json(content["plan"])
    check_memory(plan)
    sections = [Section(*row) for row in content["sections"]]
    expected = section_sizes(plan)
    if [section.name for section in sections] != list(expected):
        raise ValueError("its sections are not " + ", ".join(expected))
    for name, coder, raw_bytes, coded_bytes in sections:
        if type(raw_bytes) is not int or raw_bytes != expected[name]:
            raise ValueError(f"section {name} does not have the size its plan asks for")
        if type(coded_bytes) is not int or coded_bytes < 0:
            raise ValueError(f"section {name} has no usable size")
        if not isinstance(coder, str) or coder not in CODERS:
            raise ValueError(f"section {name} has an unknown coder")
    if not isinstance(content["meta"], dict):
        raise ValueError("its meta is not an object")
    return Header(content["meta"], plan, sections)


def declared_bytes(plan: Plan) -> int:
    """What its tensors take as float32, scales and zero points included."""
    return 4 * sum(
        (e.num_elements if e.grid else 0)
        + e.num_zeros
        + sum(math.prod(shape) for _, shape in e.stored_floats)
        for e in plan
    )


def check_memory(plan: Plan) -> None:
    """ValueError if reading may take more memory than there is: twice what the plan declares.

    A kilobyte can expand to any size, and honestly: zeros compress that well. No ratio tells such
    a file from a model of zeros, but what does not fit needs no telling.
    """
    needed = 2 * declared_bytes(plan)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"reading its tensors takes up to {needed:,} bytes, this machine has {memory:,}"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has the same key twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"its header has a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"its header has the number {text[:20]}")
    return value


@dataclass(frozen=True)
class Artifact:
    """A file read back: its meta data, plan, and float32 weights decoded from the stored codes.

    ``encoded`` and the weights stored as fp32 are views of the sections.
    """

    meta: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]
    encoded: list[Encoded]
    sections: list[Section]
    num_bytes: int


def _raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _split_planes(raw: bytes) -> bytes:
    """16-bit values -> all low bytes, then all high bytes: general coders find more to share."""
    return np.frombuffer(raw, np.uint8).reshape(-1, 2).T.tobytes()


def _join_planes(raw: Buffer) -> memoryview:
    return np.frombuffer(raw, np.uint8).reshape(2, -1).T.copy().reshape(-1).data


def pack(encoded: list[Encoded], plan: Plan, meta: Mapping[str, Any], coder: str) -> bytes:
    """The whole file as bytes. ValueError if its header is longer than a reader takes."""
    raws = {name: bytearray() for name in section_sizes(plan)}
    for item in encoded:
        if item.coded is not None:
            raws["codes"] += _raw(item.coded.codes)
            if item.entry.num_zeros and item.coded.zeros is not None:
                raws["codes"] += _raw(item.coded.zeros)
        for floats in item.floats:
            raws[section_of(floats.dtype)] += _raw(floats)
    sections, parts = [], []
    for name, size in section_sizes(plan).items():
        raw = bytes(raws.pop(name))
        raw = _split_planes(raw) if name == "floats16" else raw
        used, data = encode_section(raw, matrices_of(plan, name), coder)
        sections.append(Section(name, used, size, len(data)))
        parts.append(data)
    header = Header(dict(meta), plan, sections).as_bytes()
    body = b"".join([PREFIX.pack(MAGIC, FORMAT, len(header)), header, *parts])
    return body + hashlib.sha256(body).digest()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """How every file is written that a reader could meet half done: it has its name when all bytes
    are on the disk, and what had that name stays until then. OSError if the disk does not take it;
    nothing else is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """``whole_file`` of bytes that are there already."""
    with whole_file(path) as file:
        file.write(data)


def read_artifact(path: Path, typed: str | None = None) -> Artifact:
    """Read, check and decode a file. UserError begins with what was ``typed`` (None: artifact=PATH)
    and says what is wrong."""
    with _opened(path, typed) as file:
        return _read(file, os.fstat(file.fileno()).st_size)


def read_header_of(path: Path, typed: str | None = None) -> Header:
    """What a file says of itself, its bytes not hashed: for choosing what is then read whole.
    UserError as of ``read_artifact``."""
    with _opened(path, typed) as file:
        header_bytes = _header_bytes(file.read(PREFIX.size))
        check_length(header_bytes)
        return read_header(file.read(header_bytes))


@contextmanager
def _opened(path: Path, typed: str | None) -> Iterator[BufferedReader]:
    """Whatever goes wrong in the body is one line that names the file."""
    typed = typed or f"artifact={path}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may have no end
            raise UserError(f"{typed}: not a file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{typed}: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{typed}: there is not enough memory to read it") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{typed}: not a readable artifact ({reason})") from None


def _header_bytes(start: bytes | bytearray) -> int:
    """How long the header is, from the first bytes. ValueError if no artifact begins so."""
    if len(start) < PREFIX.size:
        raise ValueError(f"only {len(start)} bytes long")
    magic, version, header_bytes = PREFIX.unpack(start)
    if magic != MAGIC:
        raise ValueError("it does not begin as an artifact does")
    if version != FORMAT:
        age = "older" if version < FORMAT else "newer"
        raise ValueError(f"format {version}, {age} than format {FORMAT}, which this program reads")
    return int(header_bytes)


class _Body:
    """What precedes the hash, read once from the start and hashed on the way."""

    def __init__(self, file: BufferedReader, num_bytes: int) -> None:
        file.seek(0)
        self.file, self.left = file, num_bytes
        self.sha256 = hashlib.sha256()

    def take(self, count: int) -> bytearray:
        if count > self.left:
            raise ValueError(f"{count:,} bytes are to follow, and {self.left:,} do")
        data = bytearray(count)
        if self.file.readinto(data) != count:
            raise ValueError("it became shorter while it was read")
        self.sha256.update(data)
        self.left -= count
        return data


def _read(file: BufferedReader, size: int) -> Artifact:
    """Twice through the file: nothing is believed of one whose hash is wrong, and what is decoded
    is hashed again, because the file may have changed since."""
    if size < PREFIX.size + HASH_BYTES:
        raise ValueError(f"only {size} bytes long")
    body = _Body(file, size - HASH_BYTES)
    header_bytes = _header_bytes(body.take(PREFIX.size))
    while body.left:
        body.take(min(body.left, CHUNK_BYTES))
    if body.sha256.digest() != file.read(HASH_BYTES):
        raise ValueError("its SHA-256 does not match: truncated or damaged")
    checked, body = body, _Body(file, size - HASH_BYTES)
    body.take(PREFIX.size)
    if header_bytes > body.left:
        raise ValueError("its header is longer than the file")
    check_length(header_bytes)
    header = read_header(body.take(header_bytes))
    if sum(section.coded_bytes for section in header.sections) != body.left:
        raise ValueError("its sections do not end where the file does")
    raws = {
        name: CODERS[coder].decode(
            body.take(coded_bytes), raw_bytes, matrices_of(header.plan, name)
        )
        for name, coder, raw_bytes, coded_bytes in header.sections
    }
    if body.sha256.digest() != checked.sha256.digest():
        raise ValueError("it changed while it was read")
    raws["floats16"] = _join_planes(raws["floats16"])
    encoded = _split(header.plan, raws)
    weights = {}
    for item in encoded:
        weights[item.entry.name] = w = item.decode()
        if not all(map(_is_finite, item.floats)) or not _is_finite(w):
            raise ValueError(f"tensor {item.entry.name} has a value that is not finite")
    return Artifact(header.meta, header.plan, weights, encoded, header.sections, size)


def _is_finite(values: Tensor) -> bool:
    """Without a copy, as ``isfinite`` makes; a NaN is the least and the largest."""
    values = values.float() if values.element_size() == 1 else values  # which has no maxima
    return not values.numel() or all(torch.isfinite(end) for end in torch.aminmax(values))


def _split(plan: Plan, raws: Mapping[str, Buffer]) -> list[Encoded]:
    """The sections as the tensors of the plan: views, so that no code exists twice."""
    offsets = dict.fromkeys(raws, 0)

    def take(section: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        start = offsets[section]
        offsets[section] += count * dtype.itemsize
        return torch.frombuffer(raws[section], dtype=dtype, count=count, offset=start).view(shape)

    def take_codes(entry: Entry, shape: tuple[int, ...]) -> Tensor:
        assert entry.grid is not None
        codes = take("codes", torch.int8, shape)
        low, high = entry.grid.table.codes
        if codes.numel() and not low <= codes.min() <= codes.max() <= high:
            raise ValueError(f"tensor {entry.name} has a code outside its grid")
        return codes

    encoded = []
    for entry in plan:
        floats = [take(section_of(dtype), dtype, shape) for dtype, shape in entry.stored_floats]
        if entry.grid is None:
            encoded.append(Encoded(entry, plain=floats[0]))
        else:
            codes = take_codes(entry, entry.shape)
            tensor_scale = floats.pop() if entry.grid.has_tensor_scale else None
            zeros = floats.pop() if entry.grid.table.has_minimum else None
            if entry.num_zeros:
                zeros = take_codes(entry, entry.scales_shape)
            encoded.append(Encoded(entry, Codes(codes, floats[0], zeros, tensor_scale)))
    return encoded
